"""Several draws one after another: the augmentations of FYI and of IDC and NCFM.

Son et al., FYI (arXiv 2407.08113), mirror first and then draw one operation; Kim et al., IDC (arXiv 2205.14959), and
Wang et al., NCFM (arXiv 2502.20653), always mirror, colour and cut out, and draw one operation in between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsdistill.augmentations.base import Augmentation, Views
from dsdistill.augmentations.siamese import OPS, Siamese, SiameseViews
from dsdistill.core.config import from_dict, validate
from dsdistill.errors import InvalidSetting


@dataclass(frozen=True)
class ChainViews(Views):
    """One record for each stage, in order, and the stages themselves.

    So a record drawn by a chain without flips (see `Chain.suited`) can be applied by the chain it was made from.
    """

    stages: tuple[Siamese, ...]
    """What drew the parts."""
    parts: tuple[SiameseViews, ...]
    """A record of the same groups for each stage."""


@dataclass(frozen=True)
class Chain(Augmentation):
    """Stages shown one after another; each draws one of its own operations, with parameters of its own.

    Raises:
        InvalidSetting: there is no stage.
    """

    stages: tuple[Siamese, ...] = (Siamese(),)
    """What is drawn and shown, first to last; one operation of each."""

    def __post_init__(self) -> None:
        # Files hold plain mappings; a tuple of settings is rebuilt here.
        if isinstance(self.stages, (tuple, list)):
            stages = tuple(from_dict(Siamese, stage) if isinstance(stage, Mapping) else stage for stage in self.stages)
            object.__setattr__(self, "stages", stages)
        validate(self)
        if not self.stages:
            raise InvalidSetting("Chain.stages", self.stages, "give at least one stage")

    def sample(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        per: Literal["class", "image"] = "class",
        device: torch.device | str | None = None,
    ) -> ChainViews:
        """Draw a record; see `Augmentation.sample`. ``per="image"`` draws the operation of each stage once."""
        parts = tuple(stage.sample(count, shape, generator, per=per, device=device) for stage in self.stages)
        return ChainViews(shape, count, self.stages, parts)

    def apply(self, images: Tensor, views: Views, owner: Sequence[int] | Tensor | None = None) -> Tensor:
        """Show images as recorded; see `Augmentation.apply`."""
        if not isinstance(views, ChainViews):
            raise InvalidSetting("views", views, "a record that Chain.sample drew")
        if owner is not None:
            owner = torch.as_tensor(owner, device="cpu")  # waited for once, not at every stage
        for stage, part in zip(views.stages, views.parts, strict=True):
            images = stage.apply(images, part, owner)
        return images

    def suited(self, mirror_safe: bool) -> "Chain | None":
        """Without "flip" in any stage if mirrored images change their class; None if nothing remains."""
        stages = tuple(kept for stage in self.stages if (kept := stage.suited(mirror_safe)) is not None)
        return Chain(stages) if stages else None


def flip_first(ops: Sequence[str] = OPS, **strengths: float) -> Chain:
    """FYI's augmentation: if "flip" is listed, mirror every second time; then draw one of the other operations.

    Args:
        ops: the strategy; operations of `Siamese`, in any order.
        strengths: settings of `Siamese` other than ``ops``.

    Raises:
        UnknownName, InvalidSetting: as in `Siamese`.

    Example:
        >>> [stage.ops for stage in flip_first(("color", "crop", "flip")).stages]
        [('flip',), ('color', 'crop')]
    """
    return _staged(ops, [("flip",), tuple(op for op in ops if op != "flip")], strengths)


def always_flip_color_cutout(ops: Sequence[str] = ("color", "crop", "cutout"), **strengths: float) -> Chain:
    """IDC's and NCFM's augmentation: of those listed, mirror every second time, color, one of the rest, cutout.

    Their sets are matched with the default strategy, by networks that are trained with it, less "cutout" beside
    `CutMix`. Networks that learn from the sets are trained with all operations, again less "cutout" beside `CutMix`.

    Args:
        ops: the strategy; operations of `Siamese`, in any order.
        strengths: settings of `Siamese` other than ``ops``.

    Raises:
        UnknownName, InvalidSetting: as in `Siamese`.

    Example:
        >>> [stage.ops for stage in always_flip_color_cutout(("crop", "cutout", "flip", "rotate")).stages]
        [('flip',), ('crop', 'rotate'), ('cutout',)]
    """
    always = ("flip", "color", "cutout")
    rest = tuple(op for op in ops if op not in always)
    return _staged(ops, [("flip",), ("color",), rest, ("cutout",)], strengths)


def _staged(ops: Sequence[str], stages: Sequence[tuple[str, ...]], strengths: Mapping[str, float]) -> Chain:
    """A chain of those stages of which something is listed in ``ops``."""
    whole = Siamese(ops=tuple(ops), **strengths)  # refuses unknown operations and settings before they are sorted
    listed = (tuple(op for op in stage if op in whole.ops) for stage in stages)
    return Chain(tuple(Siamese(ops=stage, **strengths) for stage in listed if stage))
