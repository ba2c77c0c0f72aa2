"""How a result is written: beside what was measured, where, when, from which code and by which command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.schema import RESULT, ROOT, Commit
from dsdistill.core import storage
from dsdistill.recipe import library_versions


def write_result(
    path: Path, content: Mapping[str, Any], *, seed: int, started: Commit, device: str | torch.device = "cpu"
) -> None:
    """Add to ``content`` where, when and from what it was measured, check it, and write it atomically.

    Args:
        started: what `commit` gave before the measurement; if the code is another by now, the result counts as dirty.
    """
    moved = commit() != started
    record = {
        **content,
        "hardware": hardware(torch.device(device)),
        "versions": library_versions(),
        "commit": {"sha": started.sha, "dirty": started.dirty or moved},
        "command": command(sys.argv),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    result = RESULT.validate_python(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, result.model_dump(mode="json"))


def hardware(device: torch.device) -> dict[str, Any]:
    """This machine, without anything that would identify it."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> Commit:
    """The checked-out commit, and whether package or benchmarks differ from it."""
    changes = _git("status", "--porcelain", "--", "dsdistill", "benchmarks", ":!benchmarks/results")
    return Commit(sha=_git("rev-parse", "HEAD"), dirty=bool(changes))


def command(argv: Sequence[str]) -> str:
    """The command line as typed in the repository root; folders outside it are cut down to their names."""
    module = Path(argv[0]).resolve().relative_to(ROOT).with_suffix("")
    return shlex.join(["python", "-m", ".".join(module.parts), *map(_portable, argv[1:])])


def _portable(argument: str) -> str:
    flag, equals, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value).expanduser()
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"PATH/{path.name}"
    return flag + equals + value


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listing.read_text(), re.MULTILINE) if listing.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
