"""Mirrored pairs (Son et al., FYI: Flip Your Images for Dataset Distillation, arXiv 2407.08113).

Every image that another form decodes is shown as it is and mirrored left to right: X(S) = [S ; flip(S)]. What is
stored is the other form alone. A set saved in this form trains networks on both halves; a method that doubles images
only while it matches, as FYI does, saves ``base``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dsdistill.errors import BadData, ShapeMismatch
from dsdistill.parameterizations.base import Decoded, Parameterization


class Mirrored(Parameterization):
    """The images of ``base``, followed by their mirror images.

    Raises:
        BadData: ``base`` is mirrored already.
    """

    key = "mirrored"

    def __init__(self, base: Parameterization) -> None:
        super().__init__()
        if isinstance(base, Mirrored):
            raise BadData("a mirrored form cannot be mirrored again: every image would be there twice")
        self.base = base

    @property
    def count(self) -> int:
        return self.base.count

    @property
    def multiplicity(self) -> Tensor:
        return 2 * self.base.multiplicity

    @property
    def blocks(self) -> int:
        return 2 * self.base.blocks

    def decode(self, index: Tensor | None = None) -> Decoded:
        images, owner = self.base.decode(index)
        return Decoded(torch.cat([images, images.flip(3)]), torch.cat([owner, owner]))

    def imitate(self, images: Tensor) -> None:
        """The first half of ``images`` is taken: the second can only be its mirror."""
        if len(images) % 2:
            raise ShapeMismatch("the images to imitate", tuple(images.shape), "an even number: images, then mirrors")
        self.base.imitate(images[: len(images) // 2])

    def constrain(self) -> None:
        self.base.constrain()

    def tensors(self) -> dict[str, Tensor]:
        return self.base.tensors()

    def settings(self) -> dict[str, Any]:
        return {"base": self.base.key, "base_settings": self.base.settings()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        from dsdistill.parameterizations import FORMS

        base = FORMS.get(settings["base"])
        if base is None or base is cls:
            raise BadData(f"mirrored images of form {settings['base']!r} are unknown here")
        return cls(base.restore(tensors, settings["base_settings"]))

    def subset(self, index: Tensor) -> Self:
        return type(self)(self.base.subset(index))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        bases = [part.base for part in parts]
        if len({type(base) for base in bases}) > 1:
            raise BadData("cannot join mirrored sets of different form")
        return cls(type(bases[0]).join(bases))
