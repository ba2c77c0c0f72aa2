"""`verify`: is everything whole, to the last byte, of a set, a run, a study, labels of a set, or teachers?"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dsdistill.core import storage
from dsdistill.engine import verify as of_runs
from dsdistill.engine.verify import Finding, checked
from dsdistill.errors import BadArtifact
from dsdistill.experts import Teacher
from dsdistill.experts.committee import ORDER, trained_order
from dsdistill.experts.teacher import MANIFEST as TEACHER
from dsdistill.experts.teacher import is_foreign
from dsdistill.relabelling import LabelSet
from dsdistill.relabelling.growing import GROWING
from dsdistill.relabelling.heading import MANIFEST as LABELS
from dsdistill.studies.folder import RESULTS
from dsdistill.studies.ledger import Ledger


def verify(path: str | Path) -> list[Finding]:
    """Check what a folder holds: what `dsdistill.engine.verify.verify` does, finished or growing labels, or teachers.

    Every file is compared with the sha256 that was written down with it. Finished labels are decoded, and views that
    are drawn anew are drawn; teachers are loaded; a member of a committee that is not finished is a problem.

    Returns:
        A finding for each file, and one for what they are together.

    Raises:
        BadArtifact: there is nothing of ours at ``path``.
    """
    folder = Path(path)
    found = [one for name in (LABELS, GROWING) if os.path.lexists(folder / name) for one in _labels(folder, name)]
    found += _committee(folder)
    if os.path.isdir(folder / "cells"):
        found += _study(folder)
    try:
        found += of_runs.verify(folder)
    except BadArtifact as error:
        if not found:
            raise BadArtifact(folder, f"holds no set, run, study, labels or teachers ({error})") from error
    return found


def _study(folder: Path) -> Iterator[Finding]:
    for name, read in ((RESULTS, lambda place: Ledger(place).read()), ("study.json", storage.read_manifest)):
        if os.path.lexists(folder / name):
            yield checked(folder / name, "record of a study", partial(read, folder / name))


def _labels(folder: Path, name: str) -> Iterator[Finding]:
    yield (listing := checked(folder / name, "list of labels", partial(storage.read_manifest, folder / name)))
    if listing.problem:
        return
    manifest = storage.read_manifest(folder / name)
    files = list(_listed(folder, manifest, "labels"))
    yield from files
    if name == LABELS and not any(finding.problem for finding in files):
        yield checked(folder, "labels as a whole", lambda: LabelSet.load(folder).verify())


def _committee(folder: Path) -> Iterator[Finding]:
    """Of a teacher, or of those in the folders below."""
    alone = os.path.lexists(folder / TEACHER)
    places = [folder] if alone else sorted(place.parent for place in folder.glob(f"*/{TEACHER}"))
    for place in places:
        yield from _teacher(place)
    if alone or not (places or os.path.lexists(folder / ORDER)):
        return
    named: list[str] = []
    order = checked(folder, "committee", lambda: named.extend(trained_order(folder)))
    missing = sorted(set(named) - {place.name for place in places})
    if missing:
        told = f"the training of {', '.join(missing)} is not finished: run the same `dsdistill teachers` again"
        order = order._replace(problem=f"{folder}: {told}")
    names = [manifest.get("name") for manifest in map(_manifest, places)]
    if len(set(map(str, names))) < len(names) and not order.problem:
        order = order._replace(problem=f"{folder}: two teachers share a name among {', '.join(map(str, names))}")
    yield order


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return storage.read_manifest(folder / TEACHER)
    except BadArtifact:  # which is found of the teacher itself
        return {"name": folder.name}


def _teacher(folder: Path) -> Iterator[Finding]:
    yield (listing := checked(folder / TEACHER, "teacher", partial(storage.read_manifest, folder / TEACHER)))
    if listing.problem:
        return
    manifest = storage.read_manifest(folder / TEACHER)
    files = list(_listed(folder, manifest, "file of a teacher"))
    yield from files
    network = manifest.get("network")
    name = str(network.get("name")) if isinstance(network, dict) else ""
    if not is_foreign(name) and not any(finding.problem for finding in files):  # others' code is not run for a look
        yield checked(folder, "teacher as a whole", partial(Teacher.load, folder))


def _listed(folder: Path, manifest: dict[str, object], what: str) -> Iterator[Finding]:
    listed = manifest.get("files")
    for name in listed if isinstance(listed, dict) else []:
        yield checked(folder / name, what, partial(storage.read_listed, folder, manifest, name))
