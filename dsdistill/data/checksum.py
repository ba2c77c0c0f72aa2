"""The sha256 of large files, computed once by each process for as long as a file looks unchanged."""

import hashlib
import logging
import os
from pathlib import Path

from dsdistill.data.decode import shown

ANNOUNCED_BYTES = 2**30
"""Size from which the reading of a file is logged: it takes a second or more."""

logger = logging.getLogger("dsdistill")

_known: dict[Path, tuple[tuple[int, int, int], str]] = {}  # path -> (inode, size, time), sha256


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read from one end to the other in small parts; about a second per GB.

    A file of the same inode, size and time as at the last call of this process is not read again.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = _known.get(path)
        if known is not None and known[0] == state:
            return known[1]
        if status.st_size >= ANNOUNCED_BYTES:
            logger.info("%s: checking %.1f GB", shown(path), status.st_size / 1e9)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _known[path] = state, digest
    return digest
