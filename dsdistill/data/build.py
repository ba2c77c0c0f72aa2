"""Filling the file of a cache: a first look at all files, then blocks of rows, noted in a journal as they are done."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from tqdm import tqdm

from dsdistill.core import storage
from dsdistill.data import workers as processes
from dsdistill.data.blocks import HASH_BYTES, UNREAD, Block, survey, write
from dsdistill.data.checks import counted
from dsdistill.data.decode import Rule, shown
from dsdistill.data.listing import Listing
from dsdistill.data.read import BadImages, Shapes
from dsdistill.data.source import Skipped
from dsdistill.errors import BadData, OutOfSpace

BLOCK_BYTES = 4 * 2**20
"""Most pixels decoded before they are written; a killed build does at most the blocks in work again."""

_BLOCK_FILES = 512
PIXELS = "images.u8"
_PART, _JOURNAL = "images.part", "journal.jsonl"
logger = logging.getLogger("dsdistill")
_Item = TypeVar("_Item")


class Killed(BadData):
    """Processes that decode were killed twice; what they finished is kept."""


class Look:
    """What the first look at the files of a listing told: hashes, extents, and which cannot be decoded."""

    def __init__(self) -> None:
        self.hashes = bytearray()
        self.bad: dict[int, str] = {}
        self._extents: dict[tuple[int, int, int], list[int]] = {}  # extent -> [how many, first index]

    @property
    def all_read(self) -> bool:
        """Whether every file could be read, if not decoded."""
        return UNREAD not in (self.hash_of(index) for index in self.bad)

    def hash_of(self, index: int) -> bytes:
        """sha256 of a file."""
        return bytes(self.hashes[HASH_BYTES * index : HASH_BYTES * (index + 1)])

    def note(self, index: int, extent: tuple[int, int, int]) -> None:
        """A file will decode to (H, W, channels)."""
        known = self._extents.setdefault(extent, [0, index])
        known[0], known[1] = known[0] + 1, min(known[1], index)

    def shape(self, where: str, listing: Listing, rule: Rule, channels: int | None) -> tuple[int, int, int]:
        """(C, H, W) of the set.

        Raises:
            BadData: nothing to decode, mixed sizes or channels.
        """
        shapes = Shapes()
        for (height, width, depth), (count, first) in sorted(self._extents.items(), key=lambda item: item[1][1]):
            shapes.add(listing.paths[first], *(rule.size or (height, width)), depth, count)
        return shapes.settle(where, channels)


def look_at(where: str, listing: Listing, workers: int | None) -> Look:
    """Hash every file and read its header.

    Raises:
        Killed: processes were killed twice.
    """
    look, step = Look(), _BLOCK_FILES
    look.hashes = bytearray(HASH_BYTES * len(listing))
    tasks = _Lazy(-(-len(listing) // step), lambda number: tuple(listing.paths[number * step : (number + 1) * step]))
    with _progress(f"{where}: reading", len(listing)) as progress:
        for number, found in _in_processes(survey, tasks, where, listing, step, workers):
            first = number * step
            look.hashes[HASH_BYTES * first : HASH_BYTES * first + len(found.hashes)] = found.hashes
            look.bad |= {first + place: why for place, why in found.bad.items()}
            for place, extent in enumerate(found.extents):
                if extent is not None:
                    look.note(first + place, extent)
            progress.update(len(found.extents))
    return look


@dataclass(frozen=True)
class Blocks:
    """The growing file of a cache and its journal. Only to be used while holding the lock.

    Attributes:
        folder: of the cache.
        listing: files, one per row.
        look: what is known of them.
        shape: (C, H, W) of a row.
    """

    folder: Path
    listing: Listing
    look: Look
    rule: Rule
    shape: tuple[int, int, int]

    @property
    def step(self) -> int:
        """Rows of a block."""
        return max(1, min(_BLOCK_FILES, BLOCK_BYTES // math.prod(self.shape)))

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return len(self.listing) * math.prod(self.shape)

    @property
    def part(self) -> Path:
        """The file while it grows."""
        return self.folder / _PART

    @property
    def whole(self) -> Path:
        """The finished file."""
        return self.folder / PIXELS

    def block(self, number: int) -> Block:
        """One task."""
        first, last = number * self.step, min((number + 1) * self.step, len(self.listing))
        return Block(
            target=self.part,
            first=first,
            shape=self.shape,
            rule=self.rule,
            paths=tuple(self.listing.paths[first:last]),
            hashes=bytes(self.look.hashes[HASH_BYTES * first : HASH_BYTES * last]),
            known_bad={index - first: why for index, why in self.look.bad.items() if first <= index < last},
        )

    def prepare(self) -> dict[int, dict[int, str]]:
        """Make room; return the blocks that are done (with their bad files), after comparing their bytes.

        Raises:
            OutOfSpace: the disk cannot hold the rest.
        """
        storage.sweep_temporaries(self.folder)
        if self.whole.exists() and not self.part.exists():  # killed before the manifest was written
            os.replace(self.whole, self.part)
        done = self._done() if self.part.exists() else {}
        if not done:
            self.clear(self.folder)
            storage.write_bytes(self.folder / _JOURNAL, _line(self._header()))
        with self.part.open("ab") as file:
            present = min(getattr(os.fstat(file.fileno()), "st_blocks", 0) * 512, self.total)
            free = shutil.disk_usage(self.folder).free
            if self.total - present > free:
                raise OutOfSpace(self.folder, self.total - present, free)
            file.truncate(self.total)
        return done

    def note(self, number: int, sha256: str, bad: dict[int, str]) -> None:
        """Enter a finished block into the journal."""
        with (self.folder / _JOURNAL).open("ab") as file:
            file.write(_line({"block": number, "sha256": sha256, "bad": list(bad.items())}))

    def complete(self) -> None:
        """Flush the file to the disk and give it its final name."""
        with self.part.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(self.part, self.whole)
        storage.fsync_folder(self.folder)

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what only serves to go on with a build."""
        for name in (_PART, _JOURNAL):
            (folder / name).unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        return {"rows": len(self.listing), "shape": list(self.shape), "step": self.step}

    def _done(self) -> dict[int, dict[int, str]]:
        journal = self.folder / _JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        if not lines or lines[0] != _line(self._header()):
            return {}
        done = {}
        with self.part.open("rb") as file:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off by the kill
                    continue
                number = entry["block"]
                rows = min(self.step, len(self.listing) - number * self.step)
                file.seek(number * self.step * math.prod(self.shape))
                # After a power cut a noted block may be lost: only what is there counts.
                if hashlib.sha256(file.read(rows * math.prod(self.shape))).hexdigest() == entry["sha256"]:
                    done[number] = dict(entry["bad"])
        return done


def build(blocks: Blocks, where: str, bad_images: BadImages, workers: int | None) -> dict[int, str]:
    """Decode what is not done yet; return index -> why for the files that cannot be decoded.

    Raises:
        BadData: such a file, unless they are to be skipped; a file that changed meanwhile.
        Killed: processes were killed twice.
        OutOfSpace: the disk cannot hold the rest.
    """
    done, step, count = blocks.prepare(), blocks.step, len(blocks.listing)
    left = [number for number in range(-(-count // step)) if number not in done]
    bad = {number * step + place: why for number, found in done.items() for place, why in found.items()}
    images = counted(min(count, len(left) * step), "image")
    logger.info("%s: decoding %s into %s", where, images, shown(blocks.folder))
    with _progress(f"{where}: decoding", count) as progress:
        progress.update(count - min(count, len(left) * step))
        tasks = _Lazy(len(left), lambda place: blocks.block(left[place]))
        for place, written in _in_processes(write, tasks, where, blocks.listing, step, workers, left):
            first = left[place] * step
            found = {first + offset: why for offset, why in written.bad.items()}
            if found and bad_images.action == "error":
                bad_images.check(
                    where, [Skipped(blocks.listing.paths[index], why) for index, why in sorted(found.items())], count
                )
            blocks.note(left[place], written.sha256, written.bad)
            bad |= found
            progress.update(min(step, count - first))
    return bad


class _Lazy(Sequence[_Item], Generic[_Item]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, length: int, make: Callable[[int], _Item]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...
    def __getitem__(self, index: int | slice) -> _Item | list[_Item]:
        if isinstance(index, slice):
            return [self._make(place) for place in range(*index.indices(self._length))]
        return self._make(index)


_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def _in_processes(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    where: str,
    listing: Listing,
    step: int,
    workers: int | None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, _Result]]:
    """`workers.run` on blocks of ``step`` files; ``numbers`` are those of the blocks where not all are tasks."""
    try:
        yield from processes.run(function, tasks, workers or _default_workers(len(listing)), where)
    except processes.WorkersKilled as killed:
        blocks = [task if numbers is None else numbers[task] for task in killed.tasks]
        first, last = min(blocks) * step, min((max(blocks) + 1) * step, len(listing)) - 1
        raise Killed(
            f"{where}: processes that decode images were killed twice while they worked on files from "
            f"{shown(listing.paths[first])} to {shown(listing.paths[last])}: memory ran out, or one of them crashes "
            "its decoder; load again to go on where it stopped"
        ) from None


def _default_workers(files: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores, 1 + files // 64)  # a process takes as long to start as a few dozen images to decode


def _progress(text: str, total: int) -> "tqdm[Any]":
    return tqdm(total=total, desc=text, unit="image", leave=False, disable=None)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=True).encode() + b"\n"
