"""The output folder of a run: who may write there, what is in it, and how it is committed.

::

    DIR/dataset.json ...            the finished set (written last)
    DIR/run/run.json                the recipe of the run
    DIR/run/metrics.jsonl           one line per step
    DIR/run/lock                    held while a process works here
    DIR/run/jobs/KEY/step_*         checkpoints, removed once the set is finished
    DIR/run/jobs/KEY/part           a finished job's images, where a run has several jobs
    DIR/run/shared/NAME             what all jobs share (trained networks), removed once the set is finished
    DIR/run/last-good               what was saved when the loss stopped being finite
"""

import logging
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock

from dsdistill.core import storage
from dsdistill.engine import checkpoint
from dsdistill.engine.synthesizer import Job, State
from dsdistill.errors import BadArtifact, DistillError, OutputConflict, OutputLocked, Stopped
from dsdistill.recipe import Recipe
from dsdistill.synthetic import MANIFEST, SyntheticDataset, read_manifest

logger = logging.getLogger("dsdistill")
_RUN = "run.json"


class Workspace:
    """Exclusive, resumable use of an output folder; a context manager.

    Args:
        folder: output folder.
        recipe: of the run about to start; a folder that holds another one is refused. Once entered, `recipe` is the
            recorded one of the run that goes on.
        overwrite: start afresh, removing an earlier run and its set (nothing else) from the folder.
        keep: how many checkpoints of each job to keep.
        any_chunk: the chunk of ``recipe`` is but a default: that of a run that goes on, which may have been lowered for
            lack of memory, wins.

    Raises:
        OutputConflict: not writable, or holds another run or foreign files.
        OutputLocked: another live process works there.
        OutOfSpace: the disk is full.
        BadArtifact: the record of the earlier run is damaged.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, overwrite: bool, keep: int, any_chunk: bool = False) -> None:
        self.folder, self.recipe, self.overwrite, self.keep = folder, recipe, overwrite, keep
        self._any_chunk = any_chunk
        self.run = folder / "run"
        self._lock = filelock.FileLock(self.run / "lock")
        self._holder = self.run / "lock.json"

    def __enter__(self) -> "Workspace":
        self._refuse_foreign()
        storage.ensure_writable(self.folder)
        storage.ensure_writable(self.run)
        self._acquire()
        try:
            storage.write_json(self._holder, {"pid": os.getpid(), "host": socket.gethostname()})
            if self.overwrite:
                self._clear()
            self._compare()
        except BaseException:
            self._lock.release()
            raise
        for folder in (self.folder, self.run):
            storage.sweep_temporaries(folder)
        if self.finished:
            self._remove_scaffolding()  # a kill may have come before this
        else:
            self.record(self.recipe)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, DistillError) and not isinstance(error, Stopped) and self._nothing_kept:
                (self.run / _RUN).unlink(missing_ok=True)  # a refused run does not keep the folder from the mended one
        finally:
            self._lock.release()

    @property
    def _nothing_kept(self) -> bool:
        kept = (self.run / "jobs", self.shared, self.run / "last-good")
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return not (self.finished or logged or any(any(folder.rglob("*.*")) for folder in kept))

    def record(self, recipe: Recipe) -> None:
        """Write down how the set is being made, for whoever goes on with the run."""
        self.recipe = recipe
        storage.write_json(self.run / _RUN, storage.sealed(recipe.to_json()))

    @property
    def finished(self) -> bool:
        """Whether the folder holds a committed set."""
        return (self.folder / MANIFEST).exists()

    @property
    def metrics(self) -> Path:
        """The log of the run's steps."""
        return self.run / "metrics.jsonl"

    @property
    def shared(self) -> Path:
        """Where what all jobs share is kept."""
        return self.run / "shared"

    def require_space(self, state: State) -> None:
        """Refuse to start where the disk has no room for what the run will keep: checkpoints, and the set itself.

        Raises:
            OutOfSpace: naming folder, needed and free bytes.
        """
        held = sum(path.stat().st_size for path in (self.run / "jobs").glob("*/step_*/*"))  # will be replaced
        needed = checkpoint.nbytes(state) * (self.keep + 1) + 2 * state.images.nbytes
        storage.require_space(self.folder, max(0, needed - held))

    def job_folder(self, job: Job) -> Path:
        """Where a job keeps its checkpoints."""
        return self.run / "jobs" / quote(job.key, safe="")

    def part(self, job: Job) -> SyntheticDataset | None:
        """The images of a job that was finished earlier, or None; a damaged part is removed: the job makes it again."""
        folder = self.job_folder(job) / "part"
        if not (folder / MANIFEST).exists():
            return None
        try:
            return SyntheticDataset.load(folder)
        except BadArtifact as error:
            logger.warning("the part of job %r is discarded, the job is run again: %s", job.key, error)
        shutil.rmtree(folder)
        return None

    def save_part(self, job: Job, part: SyntheticDataset) -> None:
        """Keep a finished job's images until the whole run is finished; its checkpoints have served."""
        part.save(self.job_folder(job) / "part")
        checkpoint.clear(self.job_folder(job))

    def commit(self, synthetic: SyntheticDataset) -> None:
        """Write the finished set and remove what only served to get there."""
        synthetic.save(self.folder)
        self._remove_scaffolding()

    def _remove_scaffolding(self) -> None:
        for folder in (self.run / "jobs", self.shared):
            shutil.rmtree(folder, ignore_errors=True)

    def save_last_good(self, synthetic: SyntheticDataset) -> Path:
        """Keep the last state before divergence, marked by its place and its notes."""
        folder = self.run / "last-good"
        shutil.rmtree(folder, ignore_errors=True)
        return synthetic.save(folder)

    def read_checkpoint(self, job: Job) -> tuple[int, dict[str, Any]] | None:
        """The newest usable checkpoint of a job: finished iterations and captured state."""
        return checkpoint.read_newest(self.job_folder(job))

    def write_checkpoint(self, job: Job, iteration: int, tree: dict[str, Any]) -> None:
        """Commit a checkpoint of a job."""
        checkpoint.write(self.job_folder(job), iteration, tree, self.keep)

    # -- opening -----------------------------------------------------------------------------------------------

    def _refuse_foreign(self) -> None:
        """A folder is ours if it records a run of ours or holds a set of ours; otherwise it must be empty."""
        if not os.path.isdir(self.folder) or (self.run / _RUN).exists() or self._holder.exists():
            return
        if (self.folder / MANIFEST).exists():
            try:
                read_manifest(self.folder)
            except BadArtifact as error:
                raise OutputConflict(self.folder, f"holds a {MANIFEST} of something else ({error})") from error
            return
        foreign = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".tmp-"))
        if foreign and foreign != [self.run.name]:
            raise OutputConflict(self.folder, f"holds files that no run wrote ({foreign[0]!r}); choose an empty folder")

    def _acquire(self) -> None:
        try:
            with storage.space_for(self.run / "lock", 1):
                self._lock.acquire(timeout=0)
        except filelock.Timeout:
            try:
                owner = storage.read_json(self._holder)
                who = f"process {owner['pid']} on {owner['host']}"
            except (BadArtifact, KeyError, TypeError):  # just taken, and not yet signed
                who = "another process"
            raise OutputLocked(self.folder, who) from None

    def _clear(self) -> None:
        if (self.folder / MANIFEST).exists() or (self.folder / SyntheticDataset.FILES[0]).exists():
            (self.folder / MANIFEST).unlink(missing_ok=True)  # first, so that the rest is never mistaken for a set
            for name in SyntheticDataset.FILES:
                (self.folder / name).unlink(missing_ok=True)
        for path in (_RUN, "metrics.jsonl"):
            (self.run / path).unlink(missing_ok=True)
        for name in ("jobs", "shared", "last-good"):
            shutil.rmtree(self.run / name, ignore_errors=True)

    def _compare(self) -> None:
        if not self.finished and not (self.run / _RUN).exists():
            return
        record = self.folder / MANIFEST if self.finished else self.run / _RUN
        content = read_manifest(self.folder) if self.finished else storage.read_manifest(record)
        try:
            previous = content["recipe"] if self.finished else content
            earlier = Recipe.from_json({key: value for key, value in previous.items() if key != "seal"})
        except (AttributeError, KeyError, TypeError) as error:
            raise BadArtifact(record, f"is no record of a run ({error!r}); --overwrite starts afresh") from error
        changes = differences(_identity(earlier), _identity(self.recipe))
        if changes:
            raise OutputConflict(
                self.folder,
                f"holds another run. {_told(earlier, self.recipe, changes)}\n"
                "Choose another output folder, or --overwrite to replace it",
            )
        now = dict(self.recipe.execution)
        if self._any_chunk and earlier.execution.get("device") == now.get("device"):
            now["chunk"] = earlier.execution.get("chunk", now.get("chunk"))
        moved = differences(earlier.execution, now)
        moved += differences(earlier.versions, self.recipe.versions)
        if moved and not self.finished:
            note = f"continued under other conditions, so the last bits may differ: {'; '.join(moved)}"
            logger.warning("%s is %s", self.folder, note)
            earlier = replace(earlier, notes=tuple(dict.fromkeys((*earlier.notes, note))), execution=now)
        self.recipe = earlier


def _told(earlier: Recipe, now: Recipe, changes: list[str]) -> str:
    """In one line where method or data are others, else setting by setting."""
    there, asked = ((recipe.title, recipe.source.get("name")) for recipe in (earlier, now))
    if there != asked:
        return f"There: {there[0]} on {there[1]!r}; asked for: {asked[0]} on {asked[1]!r}."
    return "Differences (there -> asked for):\n  " + "\n  ".join(changes)


def differences(earlier: Any, now: Any, prefix: str = "") -> list[str]:
    """Field-by-field differences of plain containers, as "field: old -> new"."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*earlier, *now})
            for line in differences(earlier.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if earlier == now else [f"{prefix}: {earlier!r} -> {now!r}"]


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same run; where and under which versions they ran only touches the last bits."""
    content = recipe.to_json()
    return {key: _without_downloads(content[key]) for key in ("method", "seed", "source")}


def _without_downloads(content: Any) -> Any:
    """Settings without what only says whether files may be fetched."""
    if isinstance(content, dict):
        return {key: _without_downloads(value) for key, value in content.items() if key != "download"}
    return [_without_downloads(one) for one in content] if isinstance(content, list) else content
