"""Checks and splits shared by everything that makes an `ImageSource`."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

if TYPE_CHECKING:
    from dsdistill.data.store import PixelStore

logger = logging.getLogger("dsdistill")


def stratified(
    name: str, classes: Sequence[str], counts: Sequence[int], fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Split the indices of class-sorted items: (kept, held out), both ascending, on the generator's device.

    Of a class with n items, round(fraction * n) are held out, but at least one and at most n - 1.

    Raises:
        InvalidSetting: fraction not between 0 and 1, both excluded.
        BadData: a class has a single item.
    """
    if not 0 < fraction < 1:
        raise InvalidSetting("fraction", fraction, "the share of each class to hold out, above 0 and below 1")
    single = [title for title, count in zip(classes, counts, strict=True) if count < 2]
    if single:
        raise BadData(f"{name}: one image cannot be split in two parts; add images to the classes {some(single)}")
    kept, held, start = [], [], 0
    for count in counts:
        order = torch.randperm(count, generator=generator, device=generator.device) + start
        cut = min(max(1, round(fraction * count)), count - 1)
        held.append(order[:cut].sort().values)
        kept.append(order[cut:].sort().values)
        start += count
    return torch.cat(kept), torch.cat(held)


def require_same_classes(name: str, train: Sequence[str], test: Sequence[str]) -> None:
    """Check that a test split has the train split's classes in the same order.

    Raises:
        BadData: naming the classes that are missing, unknown or out of order.
    """
    if tuple(train) == tuple(test):
        return
    missing, unknown = [c for c in train if c not in test], [c for c in test if c not in train]
    problems = [f"lacks {some(missing)}"] if missing else []
    problems += [f"has {some(unknown)}, which the train split lacks"] if unknown else []
    if not problems:
        at = next((i for i, pair in enumerate(zip(train, test, strict=False)) if pair[0] != pair[1]), len(train))
        found = test[at] if at < len(test) else "nothing"
        problems = [f"has {found!r} as class {at} where the train split has {train[at] if at < len(train) else None!r}"]
    raise BadData(f"{name}: the test split {' and '.join(problems)}; both need the same classes in the same order")


def checked_counts(
    name: str, classes: tuple[str, ...], images: "Tensor | PixelStore", targets: Tensor
) -> tuple[int, ...]:
    """Images of each class, after checking that images, targets and class names fit together.

    Raises:
        BadData: wrong dtype, a target that names no class, a class without images, repeated class names.
        ShapeMismatch: images not (N, C, H, W), or not as many as targets.
    """
    if not classes or len(set(classes)) != len(classes):
        repeated = sorted({title for title in classes if classes.count(title) > 1})
        raise BadData(f"{name}: give at least one class and each name once; repeated: {some(repeated)}")
    if isinstance(images, Tensor) and images.dtype != torch.uint8:
        raise BadData(f"{name}: images have dtype {images.dtype}; give uint8, 0 to 255 (from_dataset converts)")
    if len(images.shape) != 4 or 0 in images.shape:
        raise ShapeMismatch(f"{name}: images", tuple(images.shape), "(N, C, H, W) with at least one pixel")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise BadData(f"{name}: targets have dtype {targets.dtype}; give integer class indices")
    if tuple(targets.shape) != (images.shape[0],):
        raise ShapeMismatch(f"{name}: targets", tuple(targets.shape), f"({images.shape[0]},), one per image")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= len(classes):
        wrong = low if low < 0 else high
        raise BadData(f"{name}: target {wrong} names no class; {known_labels(classes)}")
    counts = torch.bincount(targets.cpu().to(torch.int64), minlength=len(classes)).tolist()
    empty = [title for title, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise BadData(f"{name}: no images of {some(empty)}; add images or leave the class out")
    return tuple(counts)


def warn_of_one_class(name: str, classes: Sequence[str]) -> None:
    """Log a warning where classes cannot be told apart because there is only one."""
    if len(classes) == 1:
        logger.warning("%s: one class only (%s): nothing to tell apart", name, some(classes))


def known_labels(classes: Sequence[str]) -> str:
    """Which labels have a name, for a message."""
    return "the only class is 0" if len(classes) == 1 else f"the {len(classes)} classes are 0 to {len(classes) - 1}"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "2 images"; ``plural`` where it is not the singular with an s."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def check_size(size: int) -> None:
    """Refuse a batch size that is no positive int with `InvalidSetting`."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidSetting("size", size, "a number of images, at least 1")


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
