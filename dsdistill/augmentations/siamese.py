"""Differentiable Siamese Augmentation (Zhao & Bilen, arXiv 2102.08259)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from dsdistill.augmentations import transforms
from dsdistill.augmentations.base import Augmentation, Views, groups_of
from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting, UnknownName

OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")


@dataclass(frozen=True)
class SiameseViews(Views):
    """One operation and its parameters for each group."""

    ops: tuple[str, ...]
    """Operation of each group. On the host, so that sorting images by operation never waits for a device."""
    values: Tensor
    """``(G, 3)`` float32 parameters of each group; their meaning depends on the operation, unused ones are 0."""


@dataclass(frozen=True)
class Siamese(Augmentation):
    """One operation out of ``ops``, drawn uniformly for each class (matching) or each mini-batch (training).

    Values of a record: color (brightness added, saturation factor, contrast factor), crop (rows, columns),
    cutout (row and column of the centre), flip (1 or 0), scale (factor across, factor down), rotate (radians).
    On oblong images crop and cutout measure each axis by its own size.

    Raises:
        UnknownName: an operation is unknown.
        InvalidSetting: no operation, one named twice, or a value out of range.
    """

    ops: tuple[str, ...] = OPS
    """Operations to draw from: color, crop, cutout, flip, scale, rotate."""
    brightness: Annotated[float, Ge(0)] = 1.0
    """Width of the range of the value added to standardised pixels, centred at 0."""
    saturation: Annotated[float, Ge(0)] = 2.0
    """Upper end of the range of the saturation factor, which starts at 0."""
    contrast: Annotated[float, Ge(0)] = 0.5
    """Lower end of the range of the contrast factor, which is 1 wide."""
    crop_ratio: Annotated[float, Ge(0), Le(1)] = 0.125
    """Largest shift as a fraction of the image size, rounded to whole pixels."""
    cutout_ratio: Annotated[float, Ge(0), Le(1)] = 0.5
    """Side of the zeroed rectangle as a fraction of the image size, rounded to whole pixels."""
    scale: Annotated[float, Ge(1)] = 1.2
    """Largest factor of shrinking; the smallest is its inverse."""
    rotate: Annotated[float, Ge(0), Le(180)] = 15.0
    """Largest angle in degrees, either way."""

    def __post_init__(self) -> None:
        validate(self)
        for op in self.ops:
            if op not in OPS:
                raise UnknownName("augmentation operation", op, OPS)
        if not self.ops or len(set(self.ops)) < len(self.ops):
            raise InvalidSetting("Siamese.ops", self.ops, "name at least one operation, each once")

    def sample(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        per: Literal["class", "image"] = "class",
        device: torch.device | str | None = None,
    ) -> SiameseViews:
        """Draw a record; see `Augmentation.sample`. ``per="image"`` draws one operation for all ``count`` images."""
        if generator.device.type != "cpu":
            raise InvalidSetting("generator", str(generator.device), "pass a generator on the CPU")
        if per not in ("class", "image"):
            raise InvalidSetting("per", per, "choose 'class' or 'image'")
        if count < 1:
            raise InvalidSetting("count", count, "there must be at least one group")
        drawn = torch.randint(len(self.ops), (count if per == "class" else 1,), generator=generator).tolist()
        codes = torch.tensor(drawn).expand(count)
        uniform = torch.rand(count, 3, generator=generator, dtype=torch.float64)
        table = torch.stack([self._values(op, uniform, shape) for op in self.ops])
        values = table[codes, torch.arange(count)].float()
        if device is not None:
            values = values.to(device, non_blocking=True)
        return SiameseViews(shape, count, tuple(self.ops[code] for code in codes.tolist()), values)

    def _values(self, op: str, uniform: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Parameters of ``op`` from uniform numbers in [0, 1), ``(G, 3) -> (G, 3)``."""
        u, v, w = uniform.unbind(1)
        nothing = torch.zeros_like(u)
        if op == "color":
            parts = [(u - 0.5) * self.brightness, v * self.saturation, w + self.contrast]
        elif op == "crop":
            shifts = _pixels(self.crop_ratio, shape)
            parts = [(u * (2 * shifts[0] + 1)).floor() - shifts[0], (v * (2 * shifts[1] + 1)).floor() - shifts[1]]
        elif op == "cutout":
            sides = _pixels(self.cutout_ratio, shape)
            # An even side has its centre between two pixels, so there is one position more.
            places = [size + 1 - side % 2 for size, side in zip(shape[1:], sides, strict=True)]
            parts = [(u * places[0]).floor(), (v * places[1]).floor()]
        elif op == "flip":
            parts = [(u < 0.5).double()]
        elif op == "scale":
            parts = [x * (self.scale - 1 / self.scale) + 1 / self.scale for x in (u, v)]
        else:
            parts = [(u - 0.5) * 2 * math.radians(self.rotate)]
        return torch.stack([*parts, *[nothing] * (3 - len(parts))], 1)

    def apply(self, images: Tensor, views: Views, owner: Sequence[int] | Tensor | None = None) -> Tensor:
        """Show images as recorded; see `Augmentation.apply`. Images are bucketed by operation, each run once."""
        if not isinstance(views, SiameseViews):
            raise InvalidSetting("views", views, "a record that Siamese.sample drew")
        groups = groups_of(images, views, owner)
        names = list(dict.fromkeys(views.ops))
        codes = torch.tensor([names.index(op) for op in views.ops])[groups]
        values = views.values.to(device=images.device, dtype=images.dtype, non_blocking=True)
        values = values.index_select(0, groups.to(images.device, non_blocking=True))
        buckets = [(op, (codes == code).nonzero().flatten()) for code, op in enumerate(names)]
        buckets = [(op, members) for op, members in buckets if len(members)]
        if len(buckets) == 1:
            return self._transform(buckets[0][0], images, values)
        order = torch.cat([members for _, members in buckets])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        order, back = (index.to(images.device, non_blocking=True) for index in (order, back))
        sizes = [len(members) for _, members in buckets]
        sorted_images = torch.split(images.index_select(0, order), sizes)
        sorted_values = torch.split(values.index_select(0, order), sizes)
        shown = [
            self._transform(op, part, rows)
            for (op, _), part, rows in zip(buckets, sorted_images, sorted_values, strict=True)
        ]
        return torch.cat(shown).index_select(0, back)

    def _transform(self, op: str, images: Tensor, values: Tensor) -> Tensor:
        u, v, w = values.unbind(1)
        if op == "color":
            return transforms.color(images, u, v, w)
        if op == "crop":
            return transforms.crop(images, u, v)
        if op == "cutout":
            return transforms.cutout(images, u, v, _pixels(self.cutout_ratio, tuple(images.shape[1:])))
        if op == "flip":
            return transforms.flip(images, u)
        return transforms.scale(images, u, v) if op == "scale" else transforms.rotate(images, u)

    def suited(self, mirror_safe: bool) -> "Siamese | None":
        """Without "flip" if mirrored images change their class (digits, letters); None if nothing remains."""
        kept = self.ops if mirror_safe else tuple(op for op in self.ops if op != "flip")
        return replace(self, ops=kept) if kept else None


def _pixels(ratio: float, shape: tuple[int, ...]) -> tuple[int, int]:
    return int(ratio * shape[1] + 0.5), int(ratio * shape[2] + 0.5)
