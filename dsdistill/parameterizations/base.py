"""How the stored tensors become images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.core.stored import Stored


class Decoded(NamedTuple):
    """Images made from stored items.

    ``images``: (M, C, H, W), float32, standardised. ``owner``: (M,), int64, on the CPU so that nobody waits for
    a device to learn who is who: the stored item of each image; M
    may exceed the number of items asked for (tiles, mirrored pairs).
    """

    images: Tensor
    owner: Tensor


class Parameterization(Stored):
    """What is learned instead of plain pixels, and how it becomes images.

    Parameters of this module are what the optimiser of the images updates.
    """

    @abstractmethod
    def decode(self, index: Tensor | None = None) -> Decoded:
        """Images of the stored items at ``index`` (int64, on the CPU), all items if None; differentiable."""

    @property
    @abstractmethod
    def multiplicity(self) -> Tensor:
        """(N,), int64, on the CPU: how many images each stored item decodes to."""

    @property
    def blocks(self) -> int:
        """`decode` gives so many blocks of equally many images, one after another.

        Images at the same place of each block belong together (an image and its mirror image): who takes some, takes
        them of every block.
        """
        return 1

    @abstractmethod
    def imitate(self, images: Tensor) -> None:
        """Set what is stored so that decoding resembles ``images`` (M, C, H, W), given in the order of `decode`.

        Raises:
            ShapeMismatch: not the shape that `decode` gives.
        """

    @torch.no_grad()
    def fill_noise(self, generator: torch.Generator) -> None:
        """Set what is stored to N(0, 1), drawn on the generator's device."""
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=generator.device))

    def constrain(self) -> None:
        """Projection after an update, where a form has one of its own; nothing by default."""


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """The settings of a parameterisation: in which form a method stores its images."""

    def __post_init__(self) -> None:
        validate(self)

    @abstractmethod
    def images_per_class(self, ipc: int) -> int:
        """How many images ``ipc`` stored items of a class decode to."""

    @abstractmethod
    def build(self, per_class: Sequence[int], shape: tuple[int, int, int]) -> Parameterization:
        """Blank items, class after class.

        Args:
            per_class: stored items of each class.
            shape: (C, H, W) of one image.

        Raises:
            InvalidSetting: the form does not fit the shape.
        """
