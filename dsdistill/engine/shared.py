"""What all jobs of a run share and is costly to make: kept in memory, and in the output folder where there is one."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from dsdistill.core import storage
from dsdistill.errors import BadArtifact

logger = logging.getLogger("dsdistill")
_META, _TENSORS, _TEMPORARY = "shared.json", "shared.safetensors", ".tmp"


class Shared:
    """Named tensors, each made once per run: an interrupted run finds again what was whole.

    Args:
        folder: where to keep them until the run is finished; None for memory alone.
        give_way: called before anything is made; raises where the run was asked to stop.
        rehearsal: the run is made to learn what it costs; see `Rehearsal`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        give_way: Callable[[], None] = lambda: None,
        rehearsal: "Rehearsal | None" = None,
    ) -> None:
        self.folder, self.give_way, self.rehearsal = folder, give_way, rehearsal
        self._kept: dict[str, Mapping[str, Tensor]] = {}

    def get(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors called ``name``, on whatever device they are: kept, read, or made now and kept.

        Raises:
            OutOfSpace: the disk is full.
            Stopped: the run was asked to stop.
        """
        if name not in self._kept:
            found = self._read(name)
            if found is not None:
                logger.info("%s is there already", name)
            else:
                self.give_way()
                found = make()
                self._write(name, found)
                if self.rehearsal is not None:
                    self.rehearsal.disk += sum(tensor.numel() * tensor.element_size() for tensor in found.values())
            self._kept[name] = found
        return self._kept[name]

    def known(self, name: str) -> Mapping[str, Tensor] | None:
        """The tensors called ``name`` if they were made before."""
        return self._kept.get(name) or self._read(name)

    def _place(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / quote(name, safe="")

    def _read(self, name: str) -> Mapping[str, Tensor] | None:
        place = self._place(name)
        if place is None or not place.exists():
            return None
        try:
            return read(place)
        except BadArtifact as error:
            logger.warning("%r is discarded and made again: %s", name, error)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
        return None

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        place = self._place(name)
        if place is None:
            return
        data = storage.encode_tensors({key: tensor.detach().cpu() for key, tensor in tensors.items()})
        temporary = place.with_name(place.name + _TEMPORARY)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with storage.space_for(temporary, len(data)):
                temporary.mkdir(parents=True)
                storage.write_folder(temporary, {_TENSORS: data}, _META, {"name": name})
                temporary.rename(place)
                storage.fsync_folder(place.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


class Rehearsal:
    """Long preparations cut short: whoever cuts says what was left out.

    Attributes:
        seconds: time that the whole preparation takes beyond what was done.
        disk: bytes that it leaves in the output folder until the run is finished.
        stored: bytes that it leaves in the store.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.disk = 0
        self.stored = 0


def read(place: Path) -> Mapping[str, Tensor]:
    """The tensors of one folder.

    Raises:
        BadArtifact: incomplete or damaged.
    """
    return storage.read_listed_tensors(place, storage.read_manifest(place / _META), _TENSORS)
