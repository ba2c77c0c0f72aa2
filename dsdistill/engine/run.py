"""`synthesize`: run a method on real images, resumably, and return the set it made."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from dsdistill.core import storage
from dsdistill.core.config import require_instance, to_dict, whole_number
from dsdistill.core.device import default_chunk, is_out_of_memory, release_memory, resolve_device, settle_allocator
from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.data import ImageSource
from dsdistill.data.cache import cache_folder
from dsdistill.engine import checkpoint
from dsdistill.engine.observe import Observer, StepEvent, StopRequest
from dsdistill.engine.shared import Rehearsal, Shared
from dsdistill.engine.synthesizer import Job, Metrics, Run, State, Synthesizer
from dsdistill.engine.workspace import Workspace
from dsdistill.errors import BadArtifact, BadData, DistillError, Diverged, OutOfMemory, Stopped
from dsdistill.exchange.arrays import LEARNED_LR
from dsdistill.recipe import Recipe
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
Callback = Callable[[StepEvent], None]


def synthesize(
    method: Synthesizer,
    source: ImageSource,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    checkpoint_every: int = 100,
    keep: int = 2,
    chunk: int | None = None,
    store: str | Path | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> SyntheticDataset:
    """Distil ``source`` with ``method``.

    With ``out``, the run saves its state as it goes and the finished set at the end; the same call again
    continues an interrupted run, or returns the finished set. On one machine with one number of threads the
    result on the CPU is the same to the last bit, however often the run was interrupted.

    Args:
        method: settings of the method, e.g. ``dd.methods.DM(ipc=10)``.
        source: real images; only the training split is used.
        seed: every random draw is a function of it.
        device: "cpu", "cuda", "cuda:1", "mps", or None for the best one present. The set is returned on the CPU.
        out: output folder.
        overwrite: replace a run that ``out`` already holds.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        chunk: images that pass a network at once, None for a size that suits device and image. Changes results
            only by float rounding. When memory runs out it is halved, the step is made again, and the set's notes
            say so.
        store: folder of what other runs can use, too: experts trained on the real images. None for the cache folder
            (``$DSDISTILL_CACHE``, else ``~/.cache/dsdistill``).
        progress: show a progress bar where standard error is a terminal.
        callback: called after each step.

    Raises:
        BadData, InvalidSetting, DeviceUnavailable, OutputConflict, OutputLocked: before any work starts.
        Diverged: a loss or the state stopped being finite; the last good state is saved.
        Stopped: a signal ended the run after its state was saved (only with ``out``).
        OutOfMemory: even with one image at a time. OutOfSpace: the disk is, or would become, full.
        BadArtifact: every checkpoint of the interrupted run is damaged, or the newest whole one is no such run's.
    """
    checkpoint_every, keep = whole_number("checkpoint_every", checkpoint_every, 1), whole_number("keep", keep, 1)
    run = prepared_run(method, source, seed=seed, device=device, chunk=chunk, store=store)
    execution = Execution(method, run, checkpoint_every=checkpoint_every, progress=progress, callback=callback)
    if out is None:
        return execution()
    with Workspace(Path(out), run.recipe, overwrite=overwrite, keep=keep, any_chunk=chunk is None) as workspace:
        if workspace.finished:
            logger.info("%s holds the finished set of this very run; nothing to do", out)
            return _finished(Path(out))
        execution.workspace = workspace
        execution.run = replace(run, recipe=workspace.recipe, chunk=workspace.recipe.execution["chunk"])
        result = execution()
        workspace.commit(result)
    return result


def _finished(folder: Path) -> SyntheticDataset:
    try:
        return SyntheticDataset.load(folder)
    except BadArtifact as error:
        raise BadArtifact(
            folder, f"the finished set of this run is damaged ({error}); --overwrite makes it anew"
        ) from error


def prepared_run(
    method: Synthesizer,
    source: ImageSource,
    *,
    seed: int,
    device: str | torch.device | None,
    chunk: int | None,
    store: str | Path | None = None,
) -> Run:
    """What `synthesize` hands to the method, after every check that needs no work; arguments and errors as there."""
    require_instance("method", method, Synthesizer, "a method with its settings: dd.methods.DM(ipc=10)")
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    resolved = resolve_device(device)
    if chunk is not None:
        chunk = whole_number("chunk", chunk, 1)
    if store is not None:
        storage.require_folder(Path(store), storage.STORE)
    seed = whole_number("seed", seed)
    training = source.train_only()
    method.check(training)
    settle_allocator(resolved)
    chunk = chunk or default_chunk(source.shape, resolved)
    return Run(
        source=training.to(resolved),
        device=resolved,
        rng=Rng(seed, device=resolved),
        classes=tuple(range(source.num_classes)),
        chunk=chunk,
        recipe=_recipe(method, source, seed, resolved, chunk),
        store=cache_folder() if store is None else Path(store),
    )


def _recipe(method: Synthesizer, source: ImageSource, seed: int, device: torch.device, chunk: int) -> Recipe:
    return Recipe(
        method=to_dict(method),
        seed=seed,
        source={
            "name": source.name,
            "fingerprint": source.fingerprint,
            "counts": list(source.counts),
            "normalization": source.normalization.identity(),
            "mirror_safe": source.mirror_safe,
            **({"skipped_files": len(source.skipped)} if source.skipped else {}),
        },
        execution={"device": device.type, "threads": torch.get_num_threads(), "chunk": chunk},
    )


@dataclass
class Execution:
    """One call of `synthesize` at work: its jobs, one after the other."""

    method: Synthesizer
    run: Run
    checkpoint_every: int = 100
    progress: bool = False
    callback: Callback | None = None
    workspace: Workspace | None = None
    order: Callable[[Sequence[Job]], Sequence[Job]] = field(default=lambda jobs: jobs)
    """Which jobs to run, in which order; the result does not depend on the order, and the contract suite says so."""
    limit: int | None = None
    """Stop each job after this many steps, to learn what they cost."""
    rehearsal: Rehearsal | None = None
    """Preparations are cut short, and counted here."""
    observer: Observer = field(init=False)
    stop: StopRequest = field(init=False)
    state: State = field(init=False)
    """Of the job at work, or of the last one."""

    def __call__(self) -> SyntheticDataset:
        self.stop = StopRequest(active=self.workspace is not None)
        kept = self.workspace.shared if self.workspace else None
        shared = Shared(kept, lambda: self._give_way(steps=0), self.rehearsal)
        method, run = self.method, replace(self.run, shared=shared)
        self.run = run
        with isolated_global_rng(run.device), self.stop, self._explained():
            seed_global(run.rng.integer("global/prepare"), run.device)
            method.prepare(run)
            jobs = method.jobs(run)
            steps = f"{method.steps} steps" if method.steps else "all at once"
            work = f"{len(jobs)} jobs{' of' if method.steps else ', each'} {steps}" if len(jobs) > 1 else steps
            logger.info("%s: %s on %s", method.title, work, run.device)
            log = self.workspace.metrics if self.workspace else None
            self.observer = Observer(method.steps * len(jobs), log, self.progress, method.title)
            parts: dict[str, SyntheticDataset] = {}
            try:
                for job in self.order(jobs):
                    self._give_way(steps=0)
                    parts[job.key] = self._part(job, alone=len(jobs) == 1)
            finally:
                self.observer.close()
        return _joined(self.run.recipe, [parts[job.key] for job in jobs if job.key in parts])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what to do when memory runs out where smaller chunks do not help."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(self.run, error) from error

    def _out_of_memory(self, run: Run, error: BaseException) -> OutOfMemory:
        sizes = {field.name for field in fields(self.method)} & {"ipc", "real_batch", "batch_size", "classes_together"}
        knobs = f"Lower {' or '.join(sorted(sizes))}, take a smaller network" if sizes else "Take a smaller network"
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        if run.couples_batches or self.method.whole_batches:
            problem += "; with batch normalisation all images of a batch pass together, whatever the chunk"
        return OutOfMemory(self.method.title, run.chunk, problem, f"{knobs}, or run on a device with more memory.")

    def _give_way(self, steps: int) -> None:
        """Stop here if a signal asked for it."""
        if self.stop.signum is not None and self.workspace is not None:
            raise Stopped(self.stop.signum, steps, self.workspace.folder)

    def _part(self, job: Job, alone: bool) -> SyntheticDataset:
        earlier = self.workspace.part(job) if self.workspace else None
        if earlier is not None:
            self.observer.skip(job.key, self.method.steps)
            return earlier
        part = self._job(job)
        if self.workspace and not alone:
            self.workspace.save_part(job, part)
        return part

    def _job(self, job: Job) -> SyntheticDataset:
        method, run = self.method, self.run.scoped(job)
        seed_global(run.rng.integer("global/start"), run.device)
        state = self.state = method.start(run, job)
        state.images.to(run.device)
        state.labels.to(run.device)
        if self.workspace:
            self.workspace.require_space(state)
        done = self._resume(job, state)
        watch = _Watch(self, run, job, state, done)
        end = method.steps if self.limit is None else min(self.limit, method.steps)
        while done < end:
            metrics, failure = self._step(run, state, done)
            if metrics is None:
                run, done = self._shrunk(run, watch, failure)
                continue
            watch.add(done, metrics)
            done += 1
            stopping = self.stop.signum is not None
            save = stopping or (done % self.checkpoint_every == 0 and done < end)
            if save or done == end or done % watch.read_every == 0:
                watch.read()
            if save and self.workspace:
                self.workspace.write_checkpoint(job, done, checkpoint.capture(state))
            if stopping:
                self._give_way(steps=done)
        seed_global(run.rng.integer("global/finish"), run.device)
        return method.finish(run, state)

    def _step(self, run: Run, state: State, iteration: int) -> tuple[Metrics | None, BaseException | None]:
        """One step's metrics, or what it said when memory ran out: kept without its frames, which hold tensors."""
        seed_global(run.rng.integer("global/step", iteration), run.device)
        try:
            return self.method.step(run, state, iteration), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or isinstance(error, DistillError):
                raise
            return None, error.with_traceback(None)

    def _shrunk(self, run: Run, watch: "_Watch", failure: BaseException | None) -> tuple[Run, int]:
        """The run with half the chunk, and the last step known to be good, whose state is restored."""
        if run.chunk == 1 or run.couples_batches or self.method.whole_batches:
            raise self._out_of_memory(run, failure or MemoryError()) from failure
        release_memory(run.device)
        done, chunk = watch.rewind(), run.chunk // 2
        note = f"memory ran out at iteration {done}: from there on {chunk} images passed the network at a time"
        logger.warning("%s (%s)", note, failure)
        execution, notes = {**run.recipe.execution, "chunk": chunk}, (*self.run.recipe.notes, note)
        recipe = replace(self.run.recipe, execution=execution, notes=notes)
        # Neither jobs to come nor the process that goes on after an interruption need find out again.
        self.run = replace(self.run, chunk=chunk, recipe=recipe)
        if self.workspace:
            self.workspace.record(recipe)
        watch.run = replace(run, chunk=chunk, recipe=recipe)
        return watch.run, done

    def _resume(self, job: Job, state: State) -> int:
        found = self.workspace.read_checkpoint(job) if self.workspace else None
        begin = 0
        if found is not None:
            begin, tree = found
            self._restore(job, state, begin, tree)
            logger.info("job %r goes on after %d steps", job.key, begin)
        self.observer.skip(job.key, begin)
        return begin

    def _restore(self, job: Job, state: State, begin: int, tree: Mapping[str, Any]) -> None:
        """A whole checkpoint that does not fit was made by other code of the method, or put there by somebody."""
        try:
            if begin > self.method.steps:
                raise BadData(f"it is one after {begin} steps, and the method makes {self.method.steps}")
            checkpoint.restore(state, tree)
        except BadData as error:
            place = self.workspace.job_folder(job) if self.workspace else Path(job.key)
            raise BadArtifact(
                place, f"the checkpoint does not fit {self.method.title}: {error}; --overwrite starts afresh"
            ) from error


def _joined(recipe: Recipe, parts: Sequence[SyntheticDataset]) -> SyntheticDataset:
    """The parts as one set; notes and parents of the run and of every part are kept, once each."""
    told = [recipe, *(part.recipe for part in parts)]
    notes = dict.fromkeys(note for one in told for note in one.notes)
    parents = [parent for one in told for parent in one.parents]
    unique = [parent for index, parent in enumerate(parents) if parent not in parents[:index]]
    return replace(SyntheticDataset.join(parts), recipe=replace(recipe, notes=tuple(notes), parents=tuple(unique)))


class _Watch:
    """Reads losses (in groups), passes them on, and stops the run at the first that is not finite."""

    def __init__(self, execution: Execution, run: Run, job: Job, state: State, begin: int) -> None:
        self._execution, self.run, self._job, self._state = execution, run, job, state
        self._pending: list[tuple[int, Metrics]] = []
        self._good: tuple[int, dict[str, Any], Mapping[str, float]] = (begin, checkpoint.capture(state), {})
        # Reading a loss from an accelerator makes the host wait; there, losses are read in groups.
        self.read_every = 1 if run.device.type == "cpu" else 20

    def add(self, iteration: int, metrics: Metrics) -> None:
        self._pending.append((iteration, metrics))

    def read(self) -> None:
        for iteration, metrics in self._pending:
            values = {name: float(value) for name, value in metrics.items()}
            culprit = next((name for name, value in values.items() if value - value != 0), None)
            if culprit:
                self._diverged(iteration, culprit)
            event = self._execution.observer.step(self._job.key, iteration, values)
            if self._execution.callback:
                self._execution.callback(event)
            last, last_values = iteration, values
        if not self._pending:
            return
        self._pending.clear()
        if not checkpoint.all_finite(self._state):
            self._diverged(last, "the updated state")
        self._good = (last + 1, {}, last_values)  # lets the old copy go before the new one is made
        self._good = (last + 1, checkpoint.capture(self._state), last_values)

    def rewind(self) -> int:
        """Back to the last good state; how many steps it has seen. Metrics not read yet are forgotten."""
        done, tree, _ = self._good
        self._pending.clear()
        checkpoint.restore(self._state, tree)
        for optimizer in self._state.optimizers.values():
            optimizer.zero_grad()
        return done

    def _diverged(self, iteration: int, culprit: str) -> NoReturn:
        done, tree, metrics = self._good
        execution = self._execution
        checkpoint.restore(self._state, tree)
        note = f"NOT FINISHED: diverged at iteration {iteration}; this is the state after {done} iterations"
        recipe = replace(self.run.recipe, notes=(*self.run.recipe.notes, note))
        last_good = replace(execution.method.finish(self.run, self._state), recipe=recipe)
        saved = execution.workspace.save_last_good(last_good) if execution.workspace else None
        # A step size that is learned is told as a metric: where it diverges, those of the images are not to blame.
        lower = "lr_student or lr_lr" if culprit == LEARNED_LR else "the learning rate"
        raise Diverged(
            execution.method.title,
            self._job.key,
            iteration,
            culprit,
            metrics=metrics,
            last_good=last_good,
            saved=saved,
            lower=lower,
        )
