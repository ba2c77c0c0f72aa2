"""Where the pixels of a source live: in memory on a device, or in a file of which only what is drawn is read."""

import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdistill.errors import BadArtifact, BadData

CHUNK_BYTES = 16 * 2**20
"""Size of the parts in which all pixels are passed through."""

DEVICE_SHARE = 0.5
"""Largest share of a device's free memory that images from a file may fill; larger sets stay in the file."""


class PixelStore(ABC):
    """uint8 images (N, C, H, W) in a fixed order.

    Attributes:
        shape: (N, C, H, W).
        device: where `take` and `chunks` deliver.
    """

    shape: tuple[int, int, int, int]
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape[1:])

    @abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """uint8 (M, C, H, W) at int64 indices (M,), which may be on any device."""

    @abstractmethod
    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        """All images in order, ``size`` at a time; by default about 16 MiB. Not to be changed in place."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "PixelStore":
        """The same images delivered elsewhere; itself when they are already."""

    @abstractmethod
    def subset(self, indices: Tensor) -> "PixelStore":
        """The images at int64 indices (M,), in that order."""

    def _chunk_size(self, size: int | None) -> int:
        return max(1, CHUNK_BYTES // self.row_bytes) if size is None else size


class ResidentPixels(PixelStore):
    """All images as one tensor.

    Attributes:
        images: uint8 (N, C, H, W), contiguous.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.contiguous()
        count, channels, height, width = images.shape
        self.shape, self.device = (count, channels, height, width), images.device

    def take(self, indices: Tensor) -> Tensor:
        return self.images.index_select(0, indices.to(self.device))

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        return iter(torch.split(self.images, self._chunk_size(size)))

    def to(self, device: torch.device | str) -> PixelStore:
        moved = self.images.to(device)
        return self if moved is self.images else ResidentPixels(moved)

    def subset(self, indices: Tensor) -> PixelStore:
        return ResidentPixels(self.take(indices))


class FilePixels(PixelStore):
    """Images in a file of N * C * H * W bytes, of which each `take` reads the rows it needs.

    Rows are read by position into the result, not through a memory map of the file: both serve them from the
    system's page cache, but pages of a map count as memory of this process once they were touched (and current
    kernels map two MiB at a touch), and a map turns a file that was cut short into a crash. Threads may share a
    store; a pickled one opens its file again.

    Args:
        path: the file; opened at once and kept open, so it may be unlinked.
        shape: (N, C, H, W) of the whole file.
        rows: which rows of the file are the images, int64 (M,); None for all.
        device: where to deliver: what is read is uploaded through page-locked memory.

    Raises:
        BadArtifact: missing, or of another size than the shape says.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        rows: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path, self.file_shape, self.rows, self.device = path, shape, rows, torch.device(device)
        self.shape = (shape[0] if rows is None else len(rows), *shape[1:])
        self._file, self._lock = _opened(path, math.prod(shape)), threading.Lock()
        weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.file_shape, self.rows, self.device)

    def take(self, indices: Tensor) -> Tensor:
        places = indices.cpu()
        rows = (places if self.rows is None else self.rows[places]).tolist()
        images = self._empty(len(rows))
        for row, target in zip(rows, images.numpy(), strict=True):
            self._read(row * self.row_bytes, target.data.cast("B"))
        return images.to(self.device, non_blocking=True)

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        step = self._chunk_size(size)
        for start in range(0, len(self), step):
            count = min(step, len(self) - start)
            if self.rows is not None:
                yield self.take(torch.arange(start, start + count))
                continue
            images = self._empty(count)
            self._read(start * self.row_bytes, images.numpy().data.cast("B"))
            yield images.to(self.device, non_blocking=True)

    def to(self, device: torch.device | str) -> PixelStore:
        """Whole onto an accelerator where they fill at most `DEVICE_SHARE` of its free memory."""
        place = torch.device(device)
        if place == self.device:
            return self
        free = _free_bytes(place)
        if free is None or math.prod(self.shape) > DEVICE_SHARE * free:
            return FilePixels(self.path, self.file_shape, self.rows, place)
        images = torch.empty(self.shape, dtype=torch.uint8, device=place)
        start = 0
        for chunk in FilePixels(self.path, self.file_shape, self.rows).chunks():
            images[start : start + len(chunk)] = chunk
            start += len(chunk)
        return ResidentPixels(images)

    def subset(self, indices: Tensor) -> PixelStore:
        places = indices.cpu()
        return FilePixels(self.path, self.file_shape, places if self.rows is None else self.rows[places], self.device)

    def _empty(self, count: int) -> Tensor:
        # The allocator of page-locked memory gives it out again only when the device has read it.
        return torch.empty((count, *self.shape[1:]), dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _read(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            if hasattr(os, "preadv"):
                read = os.preadv(self._file, [target[done:]], offset + done)
            else:
                with self._lock:
                    os.lseek(self._file, offset + done, os.SEEK_SET)
                    content = os.read(self._file, len(target) - done)
                read = len(content)
                target[done : done + read] = content
            if not read:
                raise BadArtifact(self.path, "was cut short while in use; load the data again")
            done += read


def _opened(path: Path, expected: int) -> int:
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadArtifact(path, f"the cached images cannot be read ({error.strerror}); load the data again") from None
    found = os.fstat(file).st_size
    if found != expected:
        os.close(file)
        raise BadArtifact(path, f"holds {found} bytes where {expected} are expected; load the data again")
    return file


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of a device of its own, None where that is not known (or is the host's)."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def not_resident(name: str, store: PixelStore) -> BadData:
    """The error for who asks a source in a file for all its images at once."""
    gigabytes = math.prod(store.shape) / 1e9
    return BadData(
        f"{name}: the images ({gigabytes:.1f} GB) stay in a file; draw from them with per_class, gather or batches, "
        "or load with storage='memory'"
    )
