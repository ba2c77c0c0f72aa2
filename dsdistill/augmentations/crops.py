"""Random crops brought back to the full size: the views of SRe2L and of what follows it.

Yin, Xing & Shen, SRe2L (arXiv 2306.13092), recover images under one random resized crop, mirroring and cyclic shift per
step, and train on them under a crop and mirroring per image; Yin & Shen, CDA (arXiv 2311.18838), let the crops shrink.
A record is a few whole numbers per view, so it can be stored and shown again to the last bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor

from dsdistill.augmentations import transforms
from dsdistill.augmentations.base import Augmentation, Views, groups_of
from dsdistill.core.config import validate
from dsdistill.errors import BadData, InvalidSetting

_ATTEMPTS = 10  # boxes drawn for a crop before it falls back on a central one
_NUMBERS = 7
_LARGEST = 2**15 - 1  # whole numbers of 16 bits


@dataclass(frozen=True)
class CropViews(Views):
    """A box, a mirroring and a shift for each group; whole numbers, on the CPU.

    The box is brought to the size of the image, then mirrored, then shifted cyclically.
    """

    boxes: Tensor
    """``(G, 4)`` int64: first row, first column, height, width."""
    flips: Tensor
    """``(G,)`` bool: whether left and right are swapped."""
    shifts: Tensor
    """``(G, 2)`` int64: pixels down and to the right."""

    def numbers(self) -> Tensor:
        """``(G, 7)`` int16: first row, first column, height, width, mirrored (0 or 1), down, right; see `of_numbers`.

        Raises:
            InvalidSetting: the images are too large for that, above 32767 pixels.
        """
        if max(self.shape[1:]) > _LARGEST:
            raise InvalidSetting("shape", self.shape, f"records are stored for images of at most {_LARGEST} pixels")
        return torch.cat([self.boxes, self.flips[:, None].long(), self.shifts], 1).to(torch.int16)

    @classmethod
    def of_numbers(cls, numbers: Tensor, shape: tuple[int, int, int]) -> "CropViews":
        """The record that `numbers` gave.

        Args:
            numbers: ``(G, 7)`` whole numbers.
            shape: ``(C, H, W)`` of the images.

        Raises:
            BadData: they are no such record.
        """
        if numbers.dim() != 2 or numbers.shape[1] != _NUMBERS or numbers.is_floating_point():
            raise BadData(
                f"a record of crops is {numbers.dtype} of shape {tuple(numbers.shape)}, expected whole numbers (G, 7)"
            )
        whole = numbers.to("cpu", torch.int64)
        boxes, flips, shifts = whole[:, :4], whole[:, 4], whole[:, 5:]
        if bool(((flips != 0) & (flips != 1)).any()) or bool((boxes[:, 2:] < 1).any()):
            raise BadData("a record of crops has an empty box, or a mirroring that is neither 0 nor 1")
        return cls(shape, len(whole), boxes, flips.bool(), shifts)

    def rows(self, index: Sequence[int] | Tensor) -> "CropViews":
        """The record of the groups at ``index``, ``(M,)`` on the CPU, in that order."""
        at = torch.as_tensor(index, dtype=torch.int64)
        return CropViews(self.shape, len(at), self.boxes[at], self.flips[at], self.shifts[at])


@dataclass(frozen=True)
class ResizedCrop(Augmentation):
    """A random box of the image at the image's size (bilinear), mirrored or not, shifted cyclically.

    The box is drawn as torchvision's ``RandomResizedCrop`` draws it: its share of the area is uniform, the logarithm of
    its width by height too; it is rounded to whole pixels; and after ten boxes that do not fit it is a central one, as
    large as ``ratio`` lets it be. With ``scale=(1, 1)`` it is the whole image, of an oblong one too. The images of a
    class share box, mirroring and shift with ``per="class"``; each image has its own with ``per="image"``.

    Raises:
        InvalidSetting: a value is out of range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width by height."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """How often a view is mirrored."""
    shift: Annotated[int, Ge(0), Le(_LARGEST)] = 0
    """Largest cyclic shift in pixels, each way drawn uniformly from 0 on."""
    shift_both: bool = False
    """Shifts are drawn from -shift on."""

    def __post_init__(self) -> None:
        validate(self)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InvalidSetting("ResizedCrop.scale", self.scale, "two shares above 0 and up to 1, ascending")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise InvalidSetting("ResizedCrop.ratio", self.ratio, "two positive ratios, ascending")

    def sample(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        per: Literal["class", "image"] = "class",
        device: torch.device | str | None = None,
    ) -> CropViews:
        """Draw a record; see `Augmentation.sample`. It is on the CPU whatever ``device`` is."""
        _check_draw(count, generator, per)
        uniform = torch.rand(count, 2 * _ATTEMPTS + 5, generator=generator, dtype=torch.float64)
        areas, ratios, places, mirrored, moved = torch.split(uniform, [_ATTEMPTS, _ATTEMPTS, 2, 1, 2], 1)
        boxes = self._boxes(shape, areas, ratios, places)
        least = -self.shift if self.shift_both else 0
        shifts = (moved * (self.shift - least + 1)).floor().long() + least
        return CropViews(shape, count, boxes, mirrored[:, 0] < self.flip, shifts)

    def _boxes(self, shape: tuple[int, int, int], areas: Tensor, ratios: Tensor, places: Tensor) -> Tensor:
        """Boxes ``(G, 4)`` from uniform numbers: two ``(G, attempts)`` for their sizes, ``(G, 2)`` for their places."""
        _, height, width = shape
        whole = torch.tensor([height, width])
        if self.scale[0] == 1:
            return torch.tensor([[0, 0, height, width]]).expand(len(places), 4).contiguous()
        area = height * width * (self.scale[0] + areas * (self.scale[1] - self.scale[0]))
        least, most = (math.log(ratio) for ratio in self.ratio)
        ratio = (least + ratios * (most - least)).exp()
        tried = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round().long()
        fits = ((tried > 0) & (tried <= whole)).all(2)
        first = fits.int().argmax(1)
        sizes = tried[torch.arange(len(tried)), first]
        corners = (places * (whole - sizes + 1)).floor().long()
        central = self._central(height, width)
        found = fits.any(1, keepdim=True)
        return torch.where(found, torch.cat([corners, sizes], 1), torch.tensor([central]))

    def _central(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The largest central box whose ratio is allowed."""
        high, wide = height, width
        if width / height < self.ratio[0]:
            high = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            wide = round(height * self.ratio[1])
        return (height - high) // 2, (width - wide) // 2, high, wide

    def apply(self, images: Tensor, views: Views, owner: Sequence[int] | Tensor | None = None) -> Tensor:
        """Show images as recorded; see `Augmentation.apply`.

        Where every image has a record of its own (no ``owner``), rows and then columns are gathered and blended by
        separate multiplications and additions. What becomes of an image is then the same to the last bit alone, in any
        batch and on any device.

        Where images share records (an ``owner``, or one record for all), a view is two matrix products, A X Bᵀ: equal
        but for rounding, and quicker to differentiate. On CUDA their precision is that of
        ``torch.backends.cuda.matmul``; automatic mixed precision leaves them alone.

        Raises:
            InvalidSetting: the record is not one of `sample`.
            ShapeMismatch: images or owner do not fit the record.
        """
        if not isinstance(views, CropViews) or _reaches_outside(views):
            raise InvalidSetting("views", views, "a record that ResizedCrop.sample drew")
        groups = _record_of_each(images, views, owner)
        rows, columns = (_taps(views, axis, images) for axis in (0, 1))
        if owner is None and len(images) == len(views):
            return _blended(_blended(images, rows, 2), columns, 3)
        return _multiplied(images, _matrices(rows), _matrices(columns), groups)

    def suited(self, mirror_safe: bool) -> "ResizedCrop":
        """Without mirroring if mirrored images change their class (digits, letters)."""
        return self if mirror_safe else replace(self, flip=0.0)


@dataclass(frozen=True)
class PadCrop(Augmentation):
    """The image moved by up to ``pad`` pixels each way, mirrored or not: a crop of the image in a frame.

    The frame has the mean colour, 0 in standardised pixels; torchvision's ``RandomCrop`` before the standardisation, as
    the authors' code has it, pads with black.

    Raises:
        InvalidSetting: a value is out of range.
    """

    pad: Annotated[int, Ge(0), Le(_LARGEST)] = 4
    """Width of the frame in pixels."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """How often a view is mirrored."""

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
    ) -> CropViews:
        """Draw a record; see `Augmentation.sample`. Boxes have the size of the image and reach into the frame."""
        _check_draw(count, generator, per)
        down, right, mirrored = torch.rand(count, 3, generator=generator, dtype=torch.float64).unbind(1)
        corners = (torch.stack([down, right], 1) * (2 * self.pad + 1)).floor().long() - self.pad
        boxes = torch.cat([corners, torch.tensor(shape[1:]).expand(count, 2)], 1)
        return CropViews(shape, count, boxes, mirrored < self.flip, torch.zeros(count, 2, dtype=torch.int64))

    def apply(self, images: Tensor, views: Views, owner: Sequence[int] | Tensor | None = None) -> Tensor:
        """Show images as recorded; see `Augmentation.apply`. Nothing is computed: pixels are moved.

        Raises:
            InvalidSetting: the record is not one of `sample`.
            ShapeMismatch: images or owner do not fit the record.
        """
        if (
            not isinstance(views, CropViews)
            or not bool((views.boxes[:, 2:] == torch.tensor(views.shape[1:])).all())
            or bool((views.shifts != 0).any())
        ):
            raise InvalidSetting("views", views, "a record that PadCrop.sample drew")
        record = views.rows(_record_of_each(images, views, owner))
        corners, flips = (one.to(images.device, non_blocking=True) for one in (record.boxes[:, :2], record.flips))
        return transforms.flip(transforms.crop(images, corners[:, 0], corners[:, 1]), flips)

    def suited(self, mirror_safe: bool) -> "PadCrop":
        """Without mirroring if mirrored images change their class (digits, letters)."""
        return self if mirror_safe else replace(self, flip=0.0)


def least_share(
    step: int,
    steps: int,
    low: float = 0.08,
    schedule: Literal["cosine", "linear", "step"] = "cosine",
    milestone: float = 1.0,
) -> float:
    """Lower bound of `ResizedCrop.scale` at ``step`` of ``steps``: CDA's curriculum, from the whole image to ``low``.

    Args:
        step: counted from 0.
        steps: all of them.
        low: where it ends.
        schedule: along half a cosine, a line, or 1 up to the milestone.
        milestone: part of the steps after which it stays at ``low``.

    Raises:
        InvalidSetting: the schedule is none of these.

    Example:
        >>> [round(least_share(step, 4000), 5) for step in (0, 1000, 2000, 3000)]
        [1.0, 0.86527, 0.54, 0.21473]
    """
    if schedule not in ("cosine", "linear", "step"):
        raise InvalidSetting("schedule", schedule, "choose 'cosine', 'linear' or 'step'")
    if step >= milestone * steps:
        return low
    passed = step / (milestone * steps)
    if schedule == "cosine":
        return low + (1 - low) * (1 + math.cos(math.pi * passed)) / 2
    return low + (1 - low) * (1 - passed) if schedule == "linear" else 1.0


class _Taps(NamedTuple):
    """Along one axis of S pixels, the two that each pixel of a view is made of, and their weights; all ``(G, S)``."""

    near: Tensor
    far: Tensor
    near_weight: Tensor
    far_weight: Tensor


def _taps(views: CropViews, axis: int, images: Tensor) -> _Taps:
    """Where pixels of a view come from, on the device of ``images``.

    The middle of pixel q of S is at (2q + 1) l / 2S pixels of the box's l. All in whole numbers, divided once, so that
    the weights are the same on any device.
    """
    size = views.shape[1 + axis]
    begin, length = views.boxes[:, axis, None], views.boxes[:, 2 + axis, None]
    place = (torch.arange(size) - views.shifts[:, axis, None]) % size
    if axis == 1:
        place = torch.where(views.flips[:, None], size - 1 - place, place)
    middle = ((2 * place + 1) * length - size).clamp_min(0)
    near, part = middle // (2 * size), (middle % (2 * size)).double()
    far = torch.minimum(near + 1, length - 1)
    weights = ((2 * size - part) / (2 * size), part / (2 * size))
    return _Taps(
        *((begin + index).to(images.device, non_blocking=True) for index in (near, far)),
        *(weight.to(images.dtype).to(images.device, non_blocking=True) for weight in weights),
    )


def _matrices(taps: _Taps) -> Tensor:
    """``(G, S, S)``: row i has the weights of the pixels that make pixel i; 1 in sum."""
    places = torch.arange(taps.near.shape[1], device=taps.near.device)
    near, far = (index[:, :, None] == places for index in (taps.near, taps.far))
    return near * taps.near_weight[:, :, None] + far * taps.far_weight[:, :, None]


def _multiplied(images: Tensor, rows: Tensor, columns: Tensor, groups: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        if len(rows) == 1:
            return rows[0] @ (images @ columns[0].mT)
        at = groups.to(images.device, non_blocking=True)
        return rows.index_select(0, at)[:, None] @ (images @ columns.index_select(0, at)[:, None].mT)


def _blended(images: Tensor, taps: _Taps, dim: int) -> Tensor:
    """Pixels along ``dim`` (2: rows, 3: columns) of each image, made of two each."""
    near, far = (_picked(images, index, dim) for index in (taps.near, taps.far))
    weights = (taps.near_weight, taps.far_weight)
    near_weight, far_weight = (one[:, None, :, None] if dim == 2 else one[:, None, None] for one in weights)
    return near * near_weight + far * far_weight  # three operations: a fused one would round differently


def _picked(images: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows (``dim`` 2) or columns (3) ``(M, S)`` of each image."""
    if dim == 3:
        return images.gather(3, index[:, None, None].expand(images.shape))
    count, channels, height, width = images.shape
    first = torch.arange(0, count * channels * height, height, device=images.device).view(count, channels, 1)
    # Rows copied whole, several times faster than by pixel.
    return images.reshape(-1, width).index_select(0, (first + index[:, None]).flatten()).view(images.shape)


def _check_draw(count: int, generator: torch.Generator, per: str) -> None:
    if generator.device.type != "cpu":
        raise InvalidSetting("generator", str(generator.device), "pass a generator on the CPU")
    if per not in ("class", "image"):
        raise InvalidSetting("per", per, "choose 'class' or 'image'")
    if count < 1:
        raise InvalidSetting("count", count, "there must be at least one group")


def _record_of_each(images: Tensor, views: Views, owner: Sequence[int] | Tensor | None) -> Tensor:
    """The record of each image, ``(M,)`` on the CPU; a single record is that of all."""
    single = owner is None and len(views) == 1
    return groups_of(images, views, torch.zeros(len(images), dtype=torch.int64) if single else owner)


def _reaches_outside(views: CropViews) -> bool:
    corners, sizes = views.boxes[:, :2], views.boxes[:, 2:]
    return bool(((corners < 0) | (sizes < 1) | (corners + sizes > torch.tensor(views.shape[1:]))).any())
