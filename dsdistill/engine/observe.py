"""What a run shows while it works: a progress bar, one JSON line per step, and a clean end on a signal."""

import io
import json
import logging
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from dsdistill.core import storage

logger = logging.getLogger("dsdistill")
TELL_SECONDS = 30.0
"""Between two log lines of a run that no terminal shows."""


@dataclass(frozen=True)
class StepEvent:
    """One finished outer step, as given to a callback. ``seconds`` counts from the start of this process's run."""

    job: str
    iteration: int
    metrics: Mapping[str, float]
    seconds: float


class Observer:
    """Progress bar and metrics log of a run.

    Args:
        total: steps of all jobs together.
        log: JSON-lines file, or None. It is no part of the state: lines that a kill or a fault spoiled are dropped.
        progress: show a bar where standard error is a terminal, and log a line every half minute where it is none.
        title: label of the bar.
    """

    def __init__(self, total: int, log: Path | None, progress: bool, title: str) -> None:
        self._begin = time.perf_counter()
        self._path = log
        self._logged: dict[str, int] = {}  # lines that an earlier process left for each job
        if log is not None and log.exists():
            for entry in map(_parse, log.read_bytes().splitlines(keepends=True)):
                job = str(entry.get("job"))
                self._logged[job] = self._logged.get(job, 0) + 1
        self._file = _appending(log) if log else None
        self._bar = tqdm(total=total, desc=title, unit="step", disable=None if progress and total else True)
        self._title, self._total, self._done = title, total, 0
        self._tells, self._told = progress and self._bar.disable, self._begin

    def skip(self, job: str, iterations: int) -> None:
        """Begin (or go on with) a job after ``iterations`` finished steps; later lines of the log are dropped.

        Raises:
            OutOfSpace: the disk is full; the log is as it was.
        """
        self._bar.update(iterations)
        self._done += iterations
        cut_line = self._logged.pop(str(None), 0)
        if self._path is None or self._file is None or (self._logged.pop(job, 0) <= iterations and not cut_line):
            return
        self._file.close()
        entries = [(line, _parse(line)) for line in self._path.read_bytes().splitlines(keepends=True)]
        kept = [line for line, entry in entries if entry and (entry["job"] != job or entry["iteration"] < iterations)]
        storage.write_bytes(self._path, b"".join(kept))
        self._file = _appending(self._path)

    def step(self, job: str, iteration: int, metrics: Mapping[str, float]) -> StepEvent:
        """Show and log one step.

        Raises:
            OutOfSpace: the disk is full; the last line may be cut short.
        """
        event = StepEvent(job, iteration, dict(metrics), time.perf_counter() - self._begin)
        self._bar.update(1)
        self._done += 1
        if self._tells and time.perf_counter() - self._told > TELL_SECONDS:
            self._told = time.perf_counter()
            loss = f", loss {metrics['loss']:.4g}" if "loss" in metrics else ""
            logger.info("%s: step %d of %d%s", self._title, self._done, self._total, loss)
        if "loss" in metrics:
            self._bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
        if self._file and self._path:
            line = {"job": job, "iteration": iteration, **metrics, "seconds": round(event.seconds, 4)}
            data = (json.dumps(line) + "\n").encode()
            with storage.space_for(self._path, len(data)):
                while data:  # a disk that fills up takes a part of the line first
                    data = data[self._file.write(data) :]
        return event

    def close(self) -> None:
        """End the bar and the log."""
        self._bar.close()
        if self._file:
            self._file.close()


def _appending(path: Path) -> io.FileIO:
    # Unbuffered: a line that did not fit on the disk must not be tried again when the file is closed.
    return io.FileIO(path, "a")


def _parse(line: bytes) -> dict[str, Any]:
    """A line of the log, empty where it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # a kill cut the last line short
        return {}
    whole = isinstance(entry, dict) and line.endswith(b"\n")
    return entry if whole and "job" in entry and type(entry.get("iteration")) is int else {}


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish that the engine grants after the step; the second acts at once.

    Only the main thread can receive signals; elsewhere, and when not ``active``, this does nothing.
    """

    def __init__(self, active: bool) -> None:
        self.signum: int | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if self._active:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._give_back()

    def _give_back(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
