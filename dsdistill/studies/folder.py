"""The output folder of a study: who may write there, and what is in it.

::

    OUT/results.jsonl          one line per cell, see `dsdistill.studies.ledger`
    OUT/study.json             what the last grid asked for (sealed)
    OUT/cells/KEY              the run of a cell, as `dsdistill.synthesize` leaves it
    OUT/cells/KEY/error.txt    the traceback, where the cell failed
    OUT/budget.png, .svg       the plot
    OUT/lock, lock.json        held while a process works here
    OUT/stop                   there while workers are asked to stop
"""

import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import filelock

from dsdistill.core import storage
from dsdistill.engine.workspace import differences
from dsdistill.errors import BadArtifact, OutputConflict, OutputLocked
from dsdistill.recipe import method_title
from dsdistill.studies.ledger import Ledger

logger = logging.getLogger("dsdistill")
_MOST_CHANGES = 11
RESULTS, _STUDY, _HOLDER = "results.jsonl", "study.json", "lock.json"


class StudyFolder:
    """Exclusive use of a study's folder; a context manager.

    Raises:
        OutputConflict: not writable, or holds files of something else.
        OutputLocked: another live process works there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path / RESULTS)
        self.stop = path / "stop"
        self._lock = filelock.FileLock(path / "lock")

    def __enter__(self) -> "StudyFolder":
        self._refuse_foreign()
        storage.ensure_writable(self.path)
        self._acquire()
        try:
            storage.sweep_temporaries(self.path)
            self.stop.unlink(missing_ok=True)
            self.ledger.heal()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop.unlink(missing_ok=True)
        else:  # tasks that still run somewhere have nobody to work for
            self.stop.touch()
        self._lock.release()

    def cell(self, key: str) -> Path:
        """Where a cell's run lives."""
        return cell_folder(self.path, key)

    def describe(self, grid: Mapping[str, Any]) -> None:
        """Record what is asked for now; another grid than last time is welcome, and logged."""
        record = self.path / _STUDY
        if record.exists():
            try:
                earlier = {key: value for key, value in storage.read_manifest(record).items() if key != "seal"}
            except BadArtifact as error:
                logger.warning("%s; it is written anew (results are not touched)", error)
            else:
                changes = _changes(earlier, json.loads(json.dumps(grid)))
                if changes:
                    listing = "\n  ".join(changes)
                    logger.info("%s holds another grid, which stays. Differences:\n  %s", self.path, listing)
        storage.write_json(record, storage.sealed(grid))

    def write_error(self, key: str, text: str) -> None:
        """Keep the traceback of a failed cell."""
        folder = self.cell(key)
        storage.ensure_writable(folder)
        storage.write_bytes(error_file(folder), text.encode("utf-8", "backslashreplace"))

    def _refuse_foreign(self) -> None:
        if not self.path.is_dir() or any((self.path / name).exists() for name in (_STUDY, RESULTS, _HOLDER)):
            return
        foreign = sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".tmp-"))
        if foreign and foreign != [Path(self._lock.lock_file).name]:
            raise OutputConflict(self.path, f"holds files that no study wrote ({foreign[0]!r}); choose an empty folder")

    def _acquire(self) -> None:
        holder = self.path / _HOLDER
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            try:
                owner = json.loads(holder.read_text())
                who = f"process {owner['pid']} on {owner['host']}"
            except (OSError, ValueError, KeyError):
                who = "another process"
            raise OutputLocked(self.path, who) from None
        storage.write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a reader wants to know of two grids, in at most a dozen short lines; empty where only versions differ."""
    old, new = ({method_title(method): method for method in grid.get("methods", [])} for grid in (earlier, now))
    found = differences(_readable(earlier), _readable(now))
    found += [line for name in old if name in new for line in differences(old[name], new[name], name)]
    changes = [shorten(line, 120, placeholder=" ...") for line in found]
    more = len(changes) - _MOST_CHANGES
    return changes if more <= 0 else [*changes[:_MOST_CHANGES], f"and {more} more"]


def _readable(grid: Mapping[str, Any]) -> dict[str, Any]:
    """A grid without what follows from the rest, and with the names of its methods."""
    told = {key: value for key, value in grid.items() if key not in ("cells", "versions")}
    return {**told, "methods": [method_title(method) for method in grid.get("methods", [])]}


def cell_folder(study: Path, key: str) -> Path:
    """Where a cell's run lives."""
    return study / "cells" / key


def error_file(cell: Path) -> Path:
    """Where the traceback of a failed cell is kept."""
    return cell / "error.txt"
