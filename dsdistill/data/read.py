"""Many image files into memory, and the rules that hold for a whole set: one size, one number of channels.

Broken files end the loading, or are left out and listed, as `BadImages` says.
"""

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from dsdistill.data.checks import counted
from dsdistill.data.decode import Pixels, Rule, read_file, shown
from dsdistill.data.source import Skipped
from dsdistill.errors import BadData, InvalidSetting

OnBadImage = Literal["error", "skip"]
_LISTED = 10  # bad files named when they are left out

logger = logging.getLogger("dsdistill")
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class BadImages:
    """What to do with files that cannot be decoded.

    Attributes:
        action: "error" ends with the first one, "skip" leaves them out.
        max_skipped: largest share of a split that may be left out.
    """

    action: OnBadImage = "error"
    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        if self.action not in get_args(OnBadImage):
            raise InvalidSetting("on_bad_image", self.action, f"choose one of {', '.join(get_args(OnBadImage))}")
        if not 0 <= self.max_skipped <= 1:
            raise InvalidSetting("max_skipped", self.max_skipped, "a share of the images of a split, 0 to 1")

    def check(self, name: str, bad: Sequence[Skipped], total: int) -> None:
        """Refuse bad files where none may be, or too many of them.

        Raises:
            BadData: names the first few.
        """
        if bad and self.action == "error":
            raise BadData(f"{shown(bad[0].path)}: {bad[0].reason}")
        if len(bad) > self.max_skipped * total:
            raise BadData(
                f"{name}: {len(bad)} of {total} images are bad, more than max_skipped={self.max_skipped:g} of them: "
                f"{_first(bad)}"
            )

    def judge(self, name: str, bad: Sequence[Skipped], total: int) -> tuple[Skipped, ...]:
        """`check`, then log what is left out and return it."""
        self.check(name, bad, total)
        if bad:
            listing = _first(bad, _LISTED) + (" (source.skipped of Python lists all)" if len(bad) > _LISTED else "")
            logger.warning("%s: %d of %d images are bad and left out: %s", name, len(bad), total, listing)
        return tuple(bad)


class Shapes:
    """Counts the sizes and channels seen in a set, and judges whether they make one."""

    def __init__(self) -> None:
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._first: dict[int, Path] = {}

    def add(self, path: Path, height: int, width: int, channels: int, count: int = 1) -> None:
        """Note what a file decodes to, or ``count`` files of which it is the first."""
        self._sizes[height, width] += count
        self._first.setdefault(channels, path)

    def settle(self, name: str, channels: int | None) -> tuple[int, int, int]:
        """The (C, H, W) of the set.

        Args:
            name: what to call the set in messages.
            channels: how many the set must have; None lets the images decide.

        Raises:
            BadData: no images, several sizes, or numbers of channels that do not go together.
        """
        if len(self._sizes) != 1:
            raise BadData(f"{name}: {_mixed(self._sizes)}")
        (height, width) = next(iter(self._sizes))
        if channels == 1 and 3 in self._first:
            raise BadData(
                f"{shown(self._first[3])}: a colour image where all images so far (the train split) are grey; "
                "convert it to grey, or the others to colour"
            )
        found = set(self._first) | ({channels} if channels is not None else set())
        if found <= {1, 3}:
            return (3 if 3 in found else 1), height, width
        if len(found) > 1:
            listing = ", ".join(f"{count} ({shown(path)})" for count, path in sorted(self._first.items()))
            wanted = "" if channels is None else f" where {channels} are needed (the train split)"
            raise BadData(f"{name}: images have different numbers of channels: {listing}{wanted}; give all the same")
        return found.pop(), height, width


def read_files(
    name: str,
    paths: Sequence[Path],
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    channels: int | None = None,
    bad_images: BadImages = BadImages(),
) -> tuple[Tensor, tuple[int, ...], tuple[Skipped, ...]]:
    """Decode many files with a pool of threads, a bounded number at a time.

    Args:
        name: what to call the set in messages.
        rule: size and resize policy; without a size all files must have one.
        channels: how many the set must have; None takes 1 when every image is grey, see `Shapes`.
        bad_images: what to do with broken files.

    Returns:
        uint8 (M, C, H, W), the places in ``paths`` they come from, ascending, and the files left out.

    Raises:
        BadData: a bad file, mixed sizes or numbers of channels.
    """
    logger.info("%s: decoding %s", name, counted(len(paths), "image"))
    shapes, places, bad = Shapes(), list[int](), list[Skipped]()
    buffer: Pixels | None = None
    for place, pixels in enumerate(_in_threads(lambda path: _attempt(path, rule), paths)):
        if isinstance(pixels, Skipped):
            bad.append(pixels)
            if bad_images.action == "error":
                bad_images.check(name, bad, len(paths))
            continue
        height, width, depth = (*pixels.shape, 1)[:3]
        shapes.add(paths[place], height, width, depth)
        if buffer is None:
            planes = depth if depth > 3 or depth == 2 else 3
            buffer = allocate(name, (len(paths), planes, height, width))
        if buffer.shape[2:] == (height, width) and depth in (1, buffer.shape[1]):
            buffer[len(places)] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        places.append(place)
    skipped = bad_images.judge(name, bad, len(paths))
    if buffer is None:
        raise BadData(f"{name}: no readable image")
    channels = shapes.settle(name, channels)[0]
    kept = buffer[: len(places)]
    return torch.from_numpy(kept if channels == kept.shape[1] else kept[:, :1].copy()), tuple(places), skipped


def check_files(
    name: str,
    paths: Sequence[Path],
    rule: Rule,
    expected: tuple[int, int],
    bad_images: BadImages = BadImages(),
) -> tuple[Skipped, ...]:
    """Decode files and forget them, so that a bad one is found before hours of work and not after.

    Args:
        name: what to call the set in messages.
        rule: size and resize policy.
        expected: (H, W) that every image must have then.
        bad_images: what to do with broken files.

    Returns:
        The files to leave out.

    Raises:
        BadData: a bad file, or one of another size; names it.
    """
    bad = []
    for path, pixels in zip(paths, _in_threads(lambda path: _attempt(path, rule), paths), strict=True):
        if isinstance(pixels, Skipped):
            bad.append(pixels)
            if bad_images.action == "error":
                break
        elif pixels.shape[:2] != expected:
            raise BadData(f"{shown(path)}: {other_size(pixels.shape[0], pixels.shape[1], expected)}")
    return bad_images.judge(name, bad, len(paths))


def other_size(height: int, width: int, expected: tuple[int, int]) -> str:
    """What is wrong with an image of another size than the training images."""
    return (
        f"{height} x {width} pixels where the training images have {expected[0]} x {expected[1]}; "
        "give image_size=... to resize all"
    )


def allocate(name: str, shape: tuple[int, ...]) -> Pixels:
    """Room for uint8 pixels.

    Raises:
        BadData: there is not that much memory.
    """
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        gigabytes = math.prod(shape) / 1e9
        raise BadData(
            f"{name}: the images need {gigabytes:.0f} GB of memory; keep them on disk with storage='cache', "
            "or pass a smaller image_size="
        ) from None


def _first(bad: Sequence[Skipped], limit: int = 3) -> str:
    listing = "; ".join(f"{shown(path)}: {reason}" for path, reason in bad[:limit])
    return f"{listing}; and {len(bad) - limit} more" if len(bad) > limit else listing


def _attempt(path: Path, rule: Rule) -> Pixels | Skipped:
    try:
        return read_file(path, rule)
    except BadData as error:
        return Skipped(path, str(error).removeprefix(f"{shown(path)}: "))


def _in_threads(function: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """Results in order; only a few images are in the making or waiting at any time."""
    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _mixed(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "no readable image"
    common = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sizes.most_common(5))
    rest = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    return f"images have mixed sizes, height x width: {common}{rest}; pass image_size= to resize them all"
