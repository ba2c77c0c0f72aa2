"""Where the experts of one make are kept: in files that other runs find, or in memory.

::

    STORE/experts/DIGEST/recipe.json               what they are: network, training, images
    STORE/experts/DIGEST/expert-0003.safetensors   one of them; see `dsdistill.experts.shards`
    STORE/experts/DIGEST/lock                      held by who trains

A file is whole at any time and grows by being replaced. All of it may be deleted while no process uses it; nothing is
deleted by itself.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from dsdistill.core import storage
from dsdistill.errors import BadArtifact
from dsdistill.experts import shards
from dsdistill.experts.shards import Expert

logger = logging.getLogger("dsdistill")
RECIPE = "recipe.json"
_ASK_SECONDS = 0.5  # between two looks at a request to stop, while waiting for another process


class Shelf(ABC):
    """Experts of one make by their number.

    Attributes:
        place: what to call it in messages.
    """

    place: str

    @abstractmethod
    def reached(self, index: int) -> int | None:
        """Epochs of expert ``index``; None where there is none that is whole."""

    @abstractmethod
    def load(self, index: int) -> Expert:
        """An expert that is there, to train it on."""

    @abstractmethod
    def keep(self, expert: Expert) -> None:
        """Put an expert there, in place of what was there of it.

        Raises:
            OutOfSpace: the disk is full; what was there before is untouched.
        """

    @abstractmethod
    def rows(self, index: int, epochs: Sequence[int]) -> list[Tensor]:
        """Snapshots (P,) of an expert, in the precision in which they are stored."""

    @abstractmethod
    def nbytes(self, index: int) -> int:
        """Bytes of an expert, 0 where there is none."""

    def require_space(self, needed: int) -> None:
        """Refuse to begin what will take ``needed`` bytes more than there are.

        Raises:
            OutOfSpace: the disk cannot hold as much.
        """

    @contextmanager
    def reserved(self, give_way: Callable[[], None]) -> Iterator[None]:
        """Nobody else trains these experts meanwhile.

        Args:
            give_way: called from time to time while another process does; raises to end the wait.

        Raises:
            OutputConflict: the folder cannot be written.
        """
        yield


class MemoryShelf(Shelf):
    """Experts in memory alone."""

    place = "memory"

    def __init__(self) -> None:
        self._experts: dict[int, Expert] = {}

    def reached(self, index: int) -> int | None:
        return self._experts[index].epochs if index in self._experts else None

    def load(self, index: int) -> Expert:
        return self._experts[index]

    def keep(self, expert: Expert) -> None:
        self._experts[expert.index] = expert
        expert.kept = expert.epochs

    def rows(self, index: int, epochs: Sequence[int]) -> list[Tensor]:
        return [self._experts[index].rows[epoch] for epoch in epochs]

    def nbytes(self, index: int) -> int:
        return sum(tensor.nbytes for tensor in self._experts[index].tensors.values()) if index in self._experts else 0


class FolderShelf(Shelf):
    """Experts in a folder.

    Args:
        folder: made at the first write.
        digest: of ``recipe``; files that say another one are foreign.
        recipe: what the experts are, for those who look into the folder.
        device: on which they are trained, for the same.
    """

    def __init__(self, folder: Path, digest: str, recipe: Mapping[str, Any], device: str) -> None:
        self.folder, self._digest, self._recipe, self._device = folder, digest, recipe, device
        self.place = str(folder)
        self._told: set[int] = set()  # experts of which was said that they are damaged

    def _path(self, index: int) -> Path:
        return self.folder / shards.file_name(index)

    def reached(self, index: int) -> int | None:
        path = self._path(index)
        if not path.exists():
            return None
        try:
            heading = shards.check(path)
            if (heading.buffer, heading.index) != (self._digest, index):
                raise BadArtifact(path, f"is expert {heading.index} of {heading.buffer}, put here by somebody")
        except BadArtifact as error:
            if index not in self._told:
                logger.warning("this expert is not used, and trained again: %s", error)
            self._told.add(index)
            return None
        return heading.epochs

    def load(self, index: int) -> Expert:
        return shards.read(self._path(index))

    def keep(self, expert: Expert) -> None:
        shards.write(self._path(expert.index), expert, self._digest, self._device)
        expert.kept = expert.epochs

    def rows(self, index: int, epochs: Sequence[int]) -> list[Tensor]:
        return shards.read_rows(self._path(index), epochs)

    def nbytes(self, index: int) -> int:
        path = self._path(index)
        return path.stat().st_size if path.exists() else 0

    @contextmanager
    def reserved(self, give_way: Callable[[], None]) -> Iterator[None]:
        with reserved_folder(self.folder, give_way, "these experts", storage.STORE):
            self._describe()
            yield

    def require_space(self, needed: int) -> None:
        storage.require_space(self.folder, needed)

    def _describe(self) -> None:
        described = storage.sealed(self._recipe)
        try:
            if storage.read_manifest(self.folder / RECIPE) == described:
                return
        except BadArtifact:
            pass  # none yet, or a damaged one; nothing is read from it
        storage.write_json(self.folder / RECIPE, described)


@contextmanager
def reserved_folder(
    folder: Path, give_way: Callable[[], None], what: str, role: str = "an output folder"
) -> Iterator[None]:
    """Nobody else trains ``what`` is kept in a folder meanwhile; what killed writers left there is swept away.

    Args:
        folder: made if needed.
        give_way: called from time to time while another process works there; raises to end the wait.
        what: for messages.
        role: what the folder is, with its article, for the same.

    Raises:
        OutputConflict: the folder cannot be written.
    """
    storage.ensure_writable(folder, role)
    lock, told = filelock.FileLock(folder / "lock"), False
    while True:
        give_way()
        try:
            lock.acquire(timeout=_ASK_SECONDS if told else 0)
            break
        except filelock.Timeout:
            if not told:
                logger.info("%s: another process trains %s; waiting for it", folder, what)
            told = True
    try:
        storage.sweep_temporaries(folder)
        yield
    finally:
        lock.release()
