"""`grid`: methods by budgets by seeds, each cell done once, whatever happens in between."""

import logging
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dsdistill.core.config import to_dict, whole_number
from dsdistill.core.device import resolve_device
from dsdistill.core.rng import isolated_global_rng
from dsdistill.data import ImageSource
from dsdistill.engine import Synthesizer
from dsdistill.errors import InvalidSetting, Stopped, UnknownName
from dsdistill.evaluation import EvaluationProtocol, get_protocol
from dsdistill.evaluation.score import BASELINES
from dsdistill.evaluation.teaching import check_rows
from dsdistill.recipe import library_versions
from dsdistill.relabelling.plan import voting
from dsdistill.studies.cells import Asked, Cell, DataReference, Scoring, make_cells, named_methods, scoring_json
from dsdistill.studies.folder import StudyFolder
from dsdistill.studies.halting import Interruption
from dsdistill.studies.ledger import Line
from dsdistill.studies.pool import OwnPool, in_this_process, over_executor
from dsdistill.studies.results import StudyResult
from dsdistill.studies.worker import SOURCES, Outcome, Task, cores

logger = logging.getLogger("dsdistill")
_MOST_WORKERS = 8  # on the CPU, unless more are asked for: each holds the images once


class StudyStopped(Stopped):
    """A signal ended the study; cells under way have saved their state.

    Attributes beside those of `Stopped`: ``done`` and ``total`` cells.
    """

    def __init__(self, signum: int, done: int, total: int, path: Path) -> None:
        super().__init__(signum, done, path)
        self.done, self.total = done, total
        self.args = (
            f"stopped by {signal.Signals(signum).name} with {done} of {total} cells done; state saved in {path}. "
            "Run the same study again to continue.",
        )


def grid(
    data: str | Path | ImageSource,
    methods: str | Synthesizer | Iterable[str | Synthesizer],
    *,
    out: str | Path,
    ipc: int | Iterable[int] = (1, 10, 50),
    seeds: int | Iterable[int] = 3,
    protocol: str | EvaluationProtocol = "dsa",
    epochs: int | None = None,
    repeats: int = 5,
    baselines: Iterable[str] = ("random",),
    whole_epochs: int | None = None,
    evaluation_seed: int | None = None,
    teachers: str | Path | Sequence[str | Path] | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    load: Mapping[str, Any] | None = None,
    retry_failed: bool = True,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> StudyResult:
    """Distil and score every method at every budget under every seed, and keep what is finished in ``out``.

    A cell that is done is never done again: the same call continues a study that was killed, also in the middle of a
    cell, and does nothing once all is done. Other grids may share the folder. A cell that fails is recorded, with its
    traceback, and the others go on.

    Cells run in spawned processes. A script may call this at its top level; if its own classes take part, the call
    belongs under ``if __name__ == "__main__"``.

    Args:
        data: name or folder, as for `dsdistill.data.load`, or a source.
        methods: names (default settings), or instances, whose ``ipc`` is replaced by each budget.
        out: folder of the study.
        ipc: budgets in stored images per class.
        seeds: seeds of the syntheses, or how many of them, counted from 0.
        protocol: name or instance; see `dsdistill.evaluate`.
        epochs: epochs instead of the protocol's.
        repeats: networks per seed and row.
        baselines: any of "random", scored in each cell, and "whole", scored once for the study.
        whole_epochs: epochs of the whole row, None for the protocol's.
        evaluation_seed: seed of all networks and random images; None for the seed of the synthesis, so that seeds are
            independent of one another, and methods under one seed paired.
        teachers: folder of a committee, or several, who are asked while networks are trained; of protocols with
            distillation, and of these alone. Cells then have the same training on classes beside.
        executor: takes the cells instead of our own processes; only ``submit`` is used. Images given as a source
            travel with every cell. Threads share torch's global generators: methods and networks that draw from them
            are then not repeatable, those of this package are.
        workers: processes (or, with an executor, cells under way at a time: None for all). 1 works in this process.
            None is one for each device; on the CPU one for each core, but at most 8, which share the cores. The number
            of threads touches the last bits of a result and is recorded.
        devices: names, dealt out in turn, one to each process; None for all CUDA devices, or else the best there is.
        load: options of `dsdistill.data.load`, for data by name or folder.
        retry_failed: try cells again that failed in an earlier call.
        checkpoint_every: steps between checkpoints.
        progress: show a bar where standard error is a terminal; elsewhere each cell is logged.

    Raises:
        InvalidSetting, UnknownName, BadData, DeviceUnavailable: before any work and any file.
        OutputConflict, OutputLocked: the folder is of something else, or another process works there.
        StudyStopped: a signal ended the study.
        OutOfSpace: the disk is full.
        BadArtifact: ``results.jsonl`` is damaged.
        concurrent.futures.BrokenExecutor: the executor given broke; what was finished is kept.
    """
    scoring = _scoring(protocol, epochs, repeats, baselines, whole_epochs, evaluation_seed, teachers)
    reference = DataReference(data, dict(load or {}))
    chosen = named_methods(methods)
    checkpoint_every = whole_number("checkpoint_every", checkpoint_every, 1)
    places = _devices(devices)
    count = _workers(workers, places, own=executor is None)
    budgets, numbers = _integers("ipc", ipc, least=1), _integers("seeds", seeds, counted=True)
    source = reference.open()
    described = reference.describe(source)
    cells = make_cells(described, chosen, budgets=budgets, seeds=numbers, scoring=scoring)
    if scoring.teachers is not None:
        scoring.teachers.load().check(source)
    for cell in cells.values():
        cell.check(source)
    with StudyFolder(Path(out)) as folder, isolated_global_rng(torch.device("cpu")):
        folder.describe(
            {
                "format": "dsdistill.study",
                "schema_version": 1,
                "data": described,
                "methods": [to_dict(method) for method in chosen],
                "ipc": budgets,
                "seeds": numbers,
                "evaluation": scoring_json(scoring),
                "cells": list(cells),
                "versions": library_versions(),
            }
        )
        study = _Study(folder, cells, retry_failed, progress)
        with Interruption(folder.stop) as stop:
            tasks = [
                Task(cell, reference, folder.path.absolute(), checkpoint_every=checkpoint_every) for cell in study.open
            ]
            if executor is not None:
                SOURCES.give(reference.key, source)
                study.run(over_executor(executor, tasks, count or len(tasks), places, stop), stop)
            elif count == 1:
                SOURCES.give(reference.key, source)
                study.run(in_this_process(tasks, places, stop), stop)
            else:
                given = (reference.key, source) if isinstance(data, ImageSource) else None
                slim = [replace(task, data=reference.key) for task in tasks] if given else tasks
                del source  # by name, each process opens it; this one need not hold it
                study.run(OwnPool(count or 1, places, stop, given).outcomes(slim), stop)
        SOURCES.forget(reference.key)
    if stop.signum is not None:
        raise StudyStopped(stop.signum, len(study.result.done), len(cells), folder.path)
    return study.result


class _Study:
    """Cells that are done, cells that are open, and what is seen of the work."""

    def __init__(self, folder: StudyFolder, cells: Mapping[str, Cell], retry_failed: bool, progress: bool) -> None:
        self._folder, self._cells = folder, cells
        self._lines = {key: line for key, line in folder.ledger.latest().items() if key in cells}
        settled = ("done",) if retry_failed else ("done", "failed")
        self._ended = {key for key, line in self._lines.items() if line["status"] in settled}
        self.open = [cell for key, cell in cells.items() if key not in self._ended]
        self._bar = tqdm(
            total=len(cells), initial=len(self._ended), desc="study", unit="cell", disable=None if progress else True
        )
        if self._ended:
            logger.info("%s: %d of %d cells are done already", folder.path, len(self._ended), len(cells))

    @property
    def result(self) -> StudyResult:
        """All cells of the grid that have ended, in its order."""
        return StudyResult(tuple(self._lines[key] for key in self._cells if key in self._lines))

    def run(self, outcomes: Iterator[tuple[Task, Outcome]], stop: Interruption) -> None:
        """Write down each outcome as it comes."""
        above_the_bar = nullcontext() if self._bar.disable else logging_redirect_tqdm()
        with closing(outcomes) as ends, self._bar, above_the_bar:  # type: ignore[type-var]  # all are generators
            for task, outcome in ends:
                if outcome.stopped is not None:
                    stop.note(outcome.stopped)
                elif outcome.line is not None:
                    self._keep(task.cell.key, outcome.line, outcome.trace)

    def _keep(self, key: str, line: Line, trace: str) -> None:
        if trace:
            self._folder.write_error(key, trace)
        self._lines[key] = self._folder.ledger.append(line)
        self._ended.add(key)
        ended = len(self._ended)
        what = f"{key[:12]} {line['method']} ipc {line['ipc']} seed {line['seed']}"
        if line["status"] == "failed":
            logger.warning("%s failed: %s: %s (%d/%d)", what, line["error"], line["message"], ended, len(self._cells))
        elif self._bar.disable:
            logger.info("%s: %.2f %% (%d/%d)", what, _percent(line), ended, len(self._cells))
        else:
            self._bar.set_postfix_str(f"{what}: {_percent(line):.2f} %", refresh=False)
        self._bar.update(ended - self._bar.n)


def _percent(line: Line) -> float:
    values = line["baselines"]["whole"] if line["whole"] else line["accuracies"]
    return 100 * float(sum(values)) / len(values)


# -- arguments ---------------------------------------------------------------------------------------------------


def _scoring(
    protocol: str | EvaluationProtocol,
    epochs: int | None,
    repeats: int,
    baselines: Iterable[str],
    whole_epochs: int | None,
    seed: int | None,
    teachers: str | Path | Sequence[str | Path] | None,
) -> Scoring:
    resolved = get_protocol(protocol) if isinstance(protocol, str) else protocol
    rows = (baselines,) if isinstance(baselines, str) else tuple(dict.fromkeys(baselines))
    for row in rows:
        if row not in BASELINES:
            raise UnknownName("baseline", row, BASELINES)
    if resolved.distillation is not None and teachers is None:
        allowed = "one whose networks learn classes alone (dsa, rethinking_hard, ...), unless teachers are named"
        raise InvalidSetting("protocol", resolved.name, allowed)
    if resolved.distillation is None and teachers is not None:
        raise InvalidSetting("teachers", teachers, f"none: protocol {resolved.name} has no distillation")
    check_rows(resolved, rows)
    asked = None if teachers is None else Asked.of(teachers)
    if asked is not None:
        voting(asked.load(), resolved.vote_temperature)  # refuses a vote by priors that are not known
    return Scoring(
        protocol=resolved if epochs is None else replace(resolved, epochs=epochs),
        repeats=repeats,
        baselines=rows,
        whole_epochs=whole_epochs,
        seed=seed,
        teachers=asked,
    )


def _integers(name: str, values: int | Iterable[int], *, least: int | None = None, counted: bool = False) -> list[int]:
    """Different integers in the order given; a single one is itself, or how many there are, counted from 0."""
    if not isinstance(values, Iterable):
        single = whole_number(name, values, 1 if counted else least)
        values = range(single) if counted else [single]
    several = list(dict.fromkeys(whole_number(name, value, least) for value in values))
    if not several:
        raise InvalidSetting(name, several, "at least one")
    return several


def _devices(devices: Sequence[str] | None) -> list[str]:
    """Names of devices that are there; by default every CUDA device, else the best one present."""
    if devices is None:
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        return found or [str(resolve_device(None))]
    names = [devices] if isinstance(devices, str) else list(devices)
    if not names:
        raise InvalidSetting("devices", names, "at least one device, or None for the best there are")
    return [str(resolve_device(name)) for name in names]


def _workers(workers: int | None, devices: Sequence[str], *, own: bool) -> int | None:
    """How many processes; with an executor, None for no limit."""
    if workers is not None:
        return whole_number("workers", workers, 1)
    if not own:
        return None
    # Never the number of open cells: it would differ in a study that goes on, and with it the threads of a process.
    return min(cores(), _MOST_WORKERS) if list(devices) == ["cpu"] else len(devices)
