"""What happens to one cell, in whichever process: synthesis, scoring, and the line that tells of it.

A line holds what the cell is (key, method, settings, ipc, seed, data, protocol, evaluation; ``whole`` for the cell of
the whole training set) and its status. A "done" one goes on with the accuracy of every network (``accuracies``,
``baselines``, paired ``gain``), bytes, seconds (of earlier, interrupted processes too), peak memory (on the CPU that of
the process since it began), device, versions and notes; a "failed" one with error, message, exit code and traceback.
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dsdistill.core.device import peak_memory, resolve_device
from dsdistill.data import ImageSource
from dsdistill.engine import synthesize
from dsdistill.errors import BadData, DistillError, Stopped
from dsdistill.evaluation import EvaluationResult, evaluate
from dsdistill.evaluation.scorer import affordable
from dsdistill.experts import Committee
from dsdistill.labels import HardLabels
from dsdistill.recipe import library_versions
from dsdistill.relabelling import label_bytes
from dsdistill.studies.cells import Cell, DataReference
from dsdistill.studies.folder import cell_folder, error_file
from dsdistill.studies.halting import Halted, Halting
from dsdistill.studies.ledger import Line
from dsdistill.synthetic import SyntheticDataset


@dataclass(frozen=True)
class Task:
    """A cell and where to work on it; can be sent to another process.

    ``data`` is a reference, or the key of one that the process has been given. ``study`` is the folder of the study.
    """

    cell: Cell
    data: DataReference | str
    study: Path
    device: str | None = None
    checkpoint_every: int = 100


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a line for the ledger, or stopped by a signal.

    ``trace`` is the traceback of a failure; its line has the status "failed".
    """

    line: Line | None = None
    trace: str = ""
    stopped: int | None = None


class _Sources:
    """Real images that this process has opened, by the key of their reference; each is opened once."""

    def __init__(self) -> None:
        self._opened: dict[str, ImageSource] = {}
        self._lock = threading.Lock()

    def give(self, key: str, source: ImageSource) -> None:
        """Let tasks with this key find images that are open already."""
        with self._lock:
            self._opened[key] = source

    def forget(self, key: str) -> None:
        """Let go of images."""
        with self._lock:
            self._opened.pop(key, None)

    def get(self, data: DataReference | str) -> ImageSource:
        """The images of a reference, opened now unless they are."""
        key = data if isinstance(data, str) else data.key
        with self._lock:
            if key not in self._opened:
                if isinstance(data, str):
                    raise DistillError(f"this process was not given the images {key!r}")
                source = data.open()
                if isinstance(data.data, ImageSource):
                    return source  # came with the task: nothing would be saved by keeping it
                self._opened[key] = source
            return self._opened[key]


SOURCES = _Sources()


def run_cell(task: Task, *, patient: bool = False) -> Outcome:
    """Work on a cell; what goes wrong is told in the outcome, whose content can be sent to any process.

    Args:
        task: what to do.
        patient: see `Halting`.
    """
    try:
        with Halting(task.study / "stop", patient=patient) as halting:
            return Outcome(_measured(task, halting))
    except Stopped as stopped:
        return Outcome(stopped=stopped.signum)
    except Halted as halted:
        return Outcome(stopped=halted.signum)
    except (Exception, SystemExit) as error:
        return Outcome(failed_line(task, error), trace=traceback.format_exc())


def failed_line(task: Task, error: BaseException) -> Line:
    """What the ledger says of a cell that failed."""
    return {
        **_identity(task.cell, "failed"),
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code if isinstance(error, DistillError) else 1,
        "traceback": error_file(cell_folder(Path(), task.cell.key)).as_posix(),
        "device": {"name": task.device, "threads": torch.get_num_threads()},
        "versions": library_versions(),
        "finished": _now(),
    }


def _measured(task: Task, halting: Halting) -> Line:
    cell, folder = task.cell, cell_folder(task.study, task.cell.key)
    source = SOURCES.get(task.data)
    if source.fingerprint != cell.data["fingerprint"]:
        raise BadData(f"{source.name!r} holds other images than when the study began; run the study again")
    if cell.own is not None:
        cell.own.load()  # which refuses others than the cell is known by
    device = resolve_device(task.device)
    error_file(folder).unlink(missing_ok=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = {"synthesis": _seconds_logged(folder / "run" / "metrics.jsonl")}
    begin = time.perf_counter()
    with halting.synthesis():
        synthetic = synthesize(
            cell.method,
            source,
            seed=cell.seed,
            device=device,
            out=folder,
            checkpoint_every=task.checkpoint_every,
            progress=False,
            callback=halting.check,
        )
    halting.settle()
    seconds["synthesis"] += time.perf_counter() - begin
    peak, begin = peak_memory(device), time.perf_counter()
    scoring = cell.scoring
    teachers = None if scoring.teachers is None else scoring.teachers.load()
    result = evaluate(
        synthetic,
        source,
        protocol=scoring.protocol,
        repeats=scoring.repeats,
        baselines=scoring.baselines,
        whole_epochs=scoring.whole_epochs,
        teachers=teachers,
        seed=cell.evaluation_seed,
        device=device,
        progress=False,
    )
    seconds["evaluation"] = time.perf_counter() - begin
    return {
        **_identity(cell, "done"),
        **_scores(result),
        "bytes": _bytes(synthetic, cell, teachers),
        "images": len(synthetic),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": max(peak, result.peak_memory),
        "device": {"name": str(device), **result.context["device"]},
        "versions": result.context["versions"],
        "notes": list(synthetic.recipe.notes),
        "finished": _now(),
    }


def _identity(cell: Cell, status: str) -> Line:
    described = cell.describe()
    return {
        "key": cell.key,
        "status": status,
        "method": cell.method.title,
        "ipc": cell.ipc,
        "seed": cell.seed,
        "protocol": cell.scoring.protocol.title,
        "whole": cell.whole,
        "settings": described["method"],
        "data": described["data"],
        "evaluation": described["evaluation"],
    }


def _scores(result: EvaluationResult) -> Line:
    """Accuracies of each row, one per network, and the paired gain over random real images."""
    rows = {row: list(score.values) for row, score in result.scores.items()}
    return {
        "accuracies": rows.pop("synthetic"),
        "baselines": rows,
        "gain": list(result.gain.values) if result.gain else None,
    }


def _bytes(synthetic: SyntheticDataset, cell: Cell, teachers: Committee | None) -> dict[str, int]:
    """The stored form; ``random`` is what as many plain real images with class labels take.

    Where teachers are asked, what their labels would take in store (``taught``, 16-bit numbers for all epochs) is added
    to each.
    """
    channels, height, width = synthetic.shape
    labels = HardLabels(synthetic.labels.classes, len(synthetic.classes))
    plain = 4 * channels * height * width * synthetic.images.count + labels.nbytes
    total = synthetic.nbytes.total
    if teachers is None:
        return {**synthetic.nbytes._asdict(), "total": total, "random": plain}
    protocol, real = cell.scoring.protocol, sum(affordable(synthetic))
    own, of_random = (label_bytes(synthetic, teachers, protocol, count) for count in (None, real))
    return {**synthetic.nbytes._asdict(), "taught": own, "total": total + own, "random": plain + of_random}


def _seconds_logged(log: Path) -> float:
    """Seconds that earlier processes spent on the steps that are kept; each process counts from its own start."""
    total = last = 0.0
    for text in log.read_bytes().splitlines() if log.exists() else []:
        try:
            entry: Any = json.loads(text)
        except ValueError:  # torn by a kill
            continue
        seconds = float(entry.get("seconds", 0.0)) if isinstance(entry, Mapping) else 0.0
        if seconds < last:
            total += last
        last = seconds
    return total + last


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
