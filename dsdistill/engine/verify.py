"""`verify`: is everything that a run or a saved set left on the disk whole, to the last byte?"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dsdistill.core import storage
from dsdistill.engine import checkpoint, shared
from dsdistill.errors import BadArtifact
from dsdistill.synthetic import MANIFEST, SyntheticDataset, read_manifest


class Finding(NamedTuple):
    """What was found of one file or folder. ``problem`` is empty where it is whole."""

    path: Path
    what: str
    problem: str = ""


def verify(path: str | Path) -> list[Finding]:
    """Check a saved set, the output folder of a run with all its checkpoints and parts, or all cells of a study.

    Every file is compared with the sha256 that was written down with it; tensors must be finite and fit what the
    manifest says of them.

    Returns:
        A finding for each file of a set and for each checkpoint.

    Raises:
        BadArtifact: there is nothing of ours at ``path``.
    """
    folder = Path(path)
    study = os.path.isdir(folder / "cells")
    cells = sorted(cell for cell in (folder / "cells").glob("*") if (cell / "run").is_dir()) if study else []
    if cells:
        return [finding for cell in cells for finding in verify(cell)]
    ran = os.path.isdir(folder / "run")
    jobs = sorted((folder / "run" / "jobs").glob("*")) if ran else []
    kept = [place for place in sorted((folder / "run" / "shared").glob("*")) if place.suffix != ".tmp"] if ran else []
    sets = [folder, *(job / "part" for job in jobs), folder / "run" / "last-good"]
    findings = [finding for place in sets if os.path.exists(place / MANIFEST) for finding in _set(place)]
    if os.path.exists(folder / "run" / "run.json"):
        record = folder / "run" / "run.json"
        findings.append(checked(record, "record of the run", partial(storage.read_manifest, record)))
    steps = [step for job in jobs for step in sorted(job.glob("step_*[0-9]"))]
    findings += [checked(step, "checkpoint", partial(checkpoint.read, step)) for step in steps]
    findings += [checked(place, "what jobs share", partial(shared.read, place)) for place in kept]
    orphan = folder / SyntheticDataset.FILES[0]
    if os.path.exists(orphan) and not os.path.exists(folder / MANIFEST):
        problem = (
            f"{orphan.name} lies there without it: its save was cut short, or it was removed; run the command again"
        )
        findings.append(Finding(folder / MANIFEST, "manifest", f"{folder / MANIFEST}: {problem}"))
    if not findings:
        raise BadArtifact(folder, f"holds neither a synthetic set ({MANIFEST}) nor a run (run/run.json)")
    return findings


def _set(folder: Path) -> Iterator[Finding]:
    try:
        manifest = read_manifest(folder)
    except BadArtifact as error:
        yield Finding(folder / MANIFEST, "manifest", str(error))
        return
    yield Finding(folder / MANIFEST, "manifest")
    listed = manifest.get("files")
    names = list(listed) if isinstance(listed, dict) else []
    files = [
        checked(folder / name, "file of the set", partial(storage.read_listed, folder, manifest, name))
        for name in names
    ]
    yield from files
    if not any(finding.problem for finding in files):
        yield checked(folder, "set as a whole", partial(SyntheticDataset.load, folder))


def checked(path: Path, what: str, read: Callable[[], object]) -> Finding:
    """What reading comes to."""
    try:
        read()
    except BadArtifact as error:
        return Finding(path, what, str(error))
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        return Finding(path, what, f"{path}: describes nothing that can be ({type(error).__name__}: {error})")
    return Finding(path, what)
