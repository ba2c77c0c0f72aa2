"""A folder of labels while they are made: what is there of them, kept in a list that is written after every file.

::

    FOLDER/growing.json   the heading and the files so far; gives way to labels.json when all are there
    FOLDER/lock           held by who makes them
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
from torch import Tensor

from dsdistill.core import storage
from dsdistill.errors import BadArtifact, OutputConflict, OutputLocked
from dsdistill.relabelling.heading import MANIFEST, Heading, file_bytes
from dsdistill.relabelling.labelset import LabelSet

logger = logging.getLogger("dsdistill")
GROWING, LOCK = "growing.json", "lock"


class Growing:
    """Labels that are being made; a context manager, in which their folder is one's own.

    Args:
        heading: what they are. A folder with others is refused; in one that goes on, `heading` is the recorded one.
        folder: None for memory.

    Raises:
        OutputConflict: the folder cannot be written, or holds something else.
        OutputLocked: another process makes labels there.
        OutOfSpace: the disk cannot hold what is missing.
    """

    def __init__(self, heading: Heading, folder: Path | None) -> None:
        self.heading, self.folder = heading, folder
        self._files: dict[str, dict[str, Any]] = {}
        self._held: dict[str, bytes] = {}
        self._size = file_bytes(heading.layout())
        self._done = False
        self._lock = None if folder is None else filelock.FileLock(folder / LOCK)

    def __enter__(self) -> "Growing":
        if self.folder is None or self._lock is None:
            return self
        self._refuse_foreign(self.folder)
        storage.ensure_writable(self.folder)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise OutputLocked(self.folder, "another process that labels") from None
        try:
            storage.sweep_temporaries(self.folder)
            self._go_on(self.folder)
            storage.require_space(self.folder, self.needed)
            if self.missing:
                self._write_list(self.folder)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def missing(self) -> list[str]:
        """Files that are not there yet, in order."""
        return [name for name in self.heading.names if name not in self._files]

    @property
    def needed(self) -> int:
        """Bytes that they and the manifest will take."""
        there = len(self.heading.names) - len(self.missing)
        return self.heading.predicted_bytes() - there * self._size

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep one file.

        Raises:
            OutOfSpace: the disk is full; what is there stays.
        """
        data = storage.encode_tensors(tensors)
        if self.folder is None:
            self._held[name] = data
        else:
            storage.write_bytes(self.folder / name, data)
        self._files[name] = {"bytes": len(data), "sha256": storage.sha256(data)}
        if self.folder is not None:
            self._write_list(self.folder)

    def finished(self) -> LabelSet:
        """The labels, once no file is missing."""
        files = {name: self._files[name] for name in self.heading.names}
        if self.folder is None:
            return LabelSet(self.heading, files, held=self._held)
        if not self._done:
            storage.write_json(self.folder / MANIFEST, self.heading.manifest(files))
        (self.folder / GROWING).unlink(missing_ok=True)
        return LabelSet.load(self.folder)

    def _write_list(self, folder: Path) -> None:
        storage.write_json(folder / GROWING, self.heading.manifest(self._files))

    def _refuse_foreign(self, folder: Path) -> None:
        ours = any(os.path.lexists(folder / name) for name in (MANIFEST, GROWING, LOCK))
        if folder.is_dir() and not ours and any(folder.iterdir()):
            raise OutputConflict(folder, "is not empty and holds no labels; choose another folder")

    def _go_on(self, folder: Path) -> None:
        """Take over what is there."""
        done = (folder / MANIFEST).exists()
        if not done and not (folder / GROWING).exists():
            return
        try:
            manifest = storage.read_manifest(folder / (MANIFEST if done else GROWING))
            found, files = Heading.from_json(manifest), manifest["files"]
        except (BadArtifact, LookupError, TypeError, ValueError) as error:
            raise OutputConflict(folder, f"what it holds cannot be read ({error}); choose another folder") from error
        other = [key for key, value in self.heading.identity.items() if found.identity[key] != value]
        if other:
            raise OutputConflict(
                folder, f"holds labels that differ in {', '.join(other)}; choose another folder, or the same settings"
            )
        asked, self.heading = self.heading, found
        for name, entry in files.items():
            if self._whole(folder, manifest, name):
                self._files[name] = entry
        self._done = done and not self.missing
        if self._files and self.missing:
            logger.info("%s: %d of %d files are there already", folder, len(self._files), len(found.names))
            self._warn_of_execution(folder, asked)

    def _warn_of_execution(self, folder: Path, asked: Heading) -> None:
        """Files that are made otherwise may differ in their last bits from those that an unbroken call would make."""
        before, now = self.heading.execution, asked.execution
        changed = [f"{key} {before.get(key)}, now {now.get(key)}" for key in now if before.get(key) != now.get(key)]
        if changed:
            logger.warning(
                "%s: the files that are there were made with %s: what is added may differ in the last bits from what "
                "one call would have made",
                folder,
                "; ".join(changed),
            )

    def _whole(self, folder: Path, manifest: Mapping[str, Any], name: str) -> bool:
        try:
            storage.read_listed(folder, manifest, name)
        except BadArtifact as error:
            logger.warning("this file is not used, and made again: %s", error)
            return False
        return True
