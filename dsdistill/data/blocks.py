"""What one process does with one block of image files: hash them, or decode them into the cache file.

Nothing here needs torch: the processes start fast and stay small.
"""

import hashlib
import shutil
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsdistill.data.decode import Pixels, Rule, decode, probe, read_bytes, shown
from dsdistill.errors import BadData, OutOfSpace

HASH_BYTES = 32
UNREAD = b"\0" * HASH_BYTES  # stands for the hash of a file that could not be read


class Survey(NamedTuple):
    """What a look at some files tells.

    Attributes:
        hashes: sha256 of each file, one after the other.
        extents: (H, W, channels) each will decode to, before any resizing; None where that cannot be known.
        bad: place in the block -> why the file cannot be decoded.
    """

    hashes: bytes
    extents: list[tuple[int, int, int] | None]
    bad: dict[int, str]


@dataclass(frozen=True)
class Block:
    """Files to decode into consecutive rows of the cache file.

    Attributes:
        target: the file, large enough already.
        first: row of the first image.
        shape: (C, H, W) of a row.
        paths: the files.
        hashes: sha256 of each, one after the other: another content is refused.
        known_bad: place in the block -> why a file cannot be decoded, known before.
    """

    target: Path
    first: int
    shape: tuple[int, int, int]
    rule: Rule
    paths: tuple[Path, ...]
    hashes: bytes
    known_bad: dict[int, str]


class Written(NamedTuple):
    """The sha256 of the rows of a block, and place in the block -> why a file has an empty row."""

    sha256: str
    bad: dict[int, str]


def survey(paths: tuple[Path, ...]) -> Survey:
    """Hash files and read their headers."""
    hashes, extents, bad = bytearray(), list[tuple[int, int, int] | None](), dict[int, str]()
    for place, path in enumerate(paths):
        digest, extent = UNREAD, None
        try:
            content = read_bytes(path)
            digest = hashlib.sha256(content).digest()
            extent = probe(path, content)
        except BadData as error:
            bad[place] = reason(path, error)
        hashes += digest
        extents.append(extent)
    return Survey(bytes(hashes), extents, bad)


def write(block: Block) -> Written:
    """Decode the files of a block into its rows; the rows of bad files become zeros.

    Raises:
        BadData: a file is not the one that was hashed.
        OutOfSpace: the disk is full.
    """
    rows = np.zeros((len(block.paths), *block.shape), np.uint8)
    bad = dict(block.known_bad)
    for place, path in enumerate(block.paths):
        if place in bad:
            continue
        try:
            content = read_bytes(path)
            _check_unchanged(path, content, block.hashes[HASH_BYTES * place : HASH_BYTES * (place + 1)])
            pixels = decode(path, content, block.rule)
            _check_fit(path, pixels, block.shape)
        except _Changed as error:
            raise BadData(str(error)) from None
        except BadData as error:
            bad[place] = reason(path, error)
            continue
        rows[place] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    try:
        with block.target.open("r+b", buffering=0) as file:
            file.seek(block.first * rows[0].nbytes)
            left = rows.data.cast("B")
            while left:
                left = left[file.write(left) :]
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EFBIG):
            raise
        raise OutOfSpace(block.target, rows.nbytes, shutil.disk_usage(block.target.parent).free) from None
    return Written(hashlib.sha256(rows.data).hexdigest(), bad)


def reason(path: Path, error: BadData) -> str:
    """The message without the path it begins with."""
    return str(error).removeprefix(f"{shown(path)}: ")


class _Changed(BadData):
    """The file is not the one that was hashed."""


def _check_unchanged(path: Path, content: bytes, expected: bytes) -> None:
    if hashlib.sha256(content).digest() != expected:
        raise _Changed(f"{shown(path)}: changed while the images were being read; load them again")


def _check_fit(path: Path, pixels: Pixels, shape: tuple[int, int, int]) -> None:
    height, width, channels = (*pixels.shape, 1)[:3]
    if (height, width) != shape[1:] or channels not in (1, shape[0]):
        raise BadData(
            f"{shown(path)}: {height} x {width} pixels and {channels} channels where its header led to expect "
            f"{shape[1]} x {shape[2]} and {shape[0]}; save it anew"
        )
