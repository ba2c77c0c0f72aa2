"""The lines of a study: one JSON object per finished or failed cell, appended and never rewritten."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsdistill.core import storage
from dsdistill.errors import BadArtifact, OutOfSpace

logger = logging.getLogger("dsdistill")
SCHEMA_VERSION = 1
Line = dict[str, Any]


class Ledger:
    """A file of JSON lines that survives a kill at any moment.

    A line is appended by a single write and flushed to the disk. A kill within that write leaves a torn last line,
    which `read` drops and `heal` removes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> Line:
        """Add a line and give it back as it will be read; it is on the disk when this returns.

        Raises:
            OutOfSpace: the disk or the quota is full; the file is as it was before.
        """
        full = {"schema_version": SCHEMA_VERSION, **line}
        data = (json.dumps(full, ensure_ascii=True, allow_nan=False) + "\n").encode()
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            self._write(descriptor, data, before)
        finally:
            os.close(descriptor)
        if new:
            storage.fsync_folder(self.path.parent)
        return full

    def _write(self, descriptor: int, data: bytes, before: int) -> None:
        problem = None
        try:
            written = os.write(descriptor, data)
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in storage.FULL:
                raise
            written, problem = 0, error
        if written < len(data):  # what a full disk took of it must go, or the next line would be glued to it
            os.ftruncate(descriptor, before)
            raise OutOfSpace(self.path, len(data), storage.free_space(self.path.parent)) from problem

    def read(self) -> list[Line]:
        """All whole lines, in the order in which they were written; none where there is no file.

        Raises:
            BadArtifact: a line is no line of a study, or of a newer version.
        """
        if not self.path.exists():
            return []
        whole, torn = _parted(self.path.read_bytes())
        if torn:
            logger.warning("%s: the last line is torn (%d bytes without an end) and left out", self.path, len(torn))
        return [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]

    def latest(self) -> dict[str, Line]:
        """The last line of each cell, in the order in which cells first appeared. Errors as `read`."""
        return {line["key"]: line for line in self.read()}

    def heal(self) -> None:
        """Cut off a torn last line. Only call it while holding the folder's lock."""
        if not self.path.exists():
            return
        whole, torn = _parted(self.path.read_bytes())
        if torn:
            logger.warning(
                "%s: the last line was torn by a kill and is removed (%d bytes); its cell runs again",
                self.path,
                len(torn),
            )
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())

    def _parse(self, number: int, text: bytes) -> Line:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise BadArtifact(
                self.path, f"line {number} is damaged ({error}); remove that line, and its cell runs again"
            ) from None
        if not isinstance(line, dict) or not {"key", "status", "schema_version"} <= line.keys():
            raise BadArtifact(self.path, f"line {number} is no line of a study; remove it, or choose another folder")
        version = line["schema_version"]
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise BadArtifact(
                self.path,
                f"line {number} has schema version {version}, newer than {SCHEMA_VERSION}: upgrade dsdistill",
            )
        return line


def _parted(data: bytes) -> tuple[bytes, bytes]:
    """Whole lines, and what follows the last line end."""
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]
