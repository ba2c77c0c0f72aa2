"""Changing the order of the patches of a mosaic, as RDED does (Sun et al., arXiv 2312.03526)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.augmentations.base import Augmentation, Views, groups_of
from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting


@dataclass(frozen=True)
class PatchViews(Views):
    """Which rows and columns of an image are shown in which order; on the CPU."""

    rows: Tensor
    """``(G, H)`` int64."""
    columns: Tensor
    """``(G, W)`` int64."""
    then: Views | None = None
    """What is done to the result."""


@dataclass(frozen=True)
class PatchShuffle(Augmentation):
    """``factor`` strips of columns change their order, then as many strips of rows; then another view is taken.

    The first strips have a pixel more where ``factor`` does not divide the size, as the cells of a mosaic have. Orders
    are drawn for each record; so each image has its own with ``per="image"``, as in the authors' code.

    Raises:
        InvalidSetting: a value is out of range.
    """

    factor: Annotated[int, Ge(1)] = 2
    """Strips each way: patches along a side of the mosaic."""
    then: Augmentation | None = None
    """What is shown of the result."""

    def __post_init__(self) -> None:
        validate(self)

    def sample(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        per: Literal["class", "image"] = "class",
        device: torch.device | str | None = None,
    ) -> PatchViews:
        """Draw a record; see `Augmentation.sample`. Orders are on the CPU whatever ``device`` is.

        Raises:
            InvalidSetting: also if the images have fewer pixels along a side than there are strips.
        """
        if generator.device.type != "cpu":
            raise InvalidSetting("generator", str(generator.device), "pass a generator on the CPU")
        if count < 1:
            raise InvalidSetting("count", count, "there must be at least one group")
        if self.factor > min(shape[1:]):
            raise InvalidSetting("PatchShuffle.factor", self.factor, f"at most the {min(shape[1:])} pixels of a side")
        columns, rows = (self._order(count, shape[axis], generator) for axis in (2, 1))
        then = self.then.sample(count, shape, generator, per=per, device=device) if self.then is not None else None
        return PatchViews(shape, count, rows, columns, then)

    def _order(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """``(count, size)``: pixels of an axis, strip after strip, in a random order of strips."""
        turns = torch.rand(count, self.factor, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
        pixels = torch.arange(size)
        lengths = torch.tensor([len(strip) for strip in torch.tensor_split(pixels, self.factor)])
        strip = torch.repeat_interleave(torch.arange(self.factor), lengths)
        return (turns[:, strip] * size + pixels).argsort(1)

    def apply(self, images: Tensor, views: Views, owner: Sequence[int] | Tensor | None = None) -> Tensor:
        """Show images as recorded; see `Augmentation.apply`."""
        if not isinstance(views, PatchViews) or (views.then is None) != (self.then is None):
            raise InvalidSetting("views", views, "a record that PatchShuffle.sample drew")
        groups = groups_of(images, views, owner)
        rows, columns = (one[groups].to(images.device, non_blocking=True) for one in (views.rows, views.columns))
        moved = images.gather(3, columns[:, None, None].expand(images.shape))
        moved = moved.gather(2, rows[:, None, :, None].expand(images.shape))
        return moved if self.then is None or views.then is None else self.then.apply(moved, views.then, owner)

    def suited(self, mirror_safe: bool) -> "PatchShuffle":
        """With what follows suited."""
        return self if self.then is None else replace(self, then=self.then.suited(mirror_safe))
