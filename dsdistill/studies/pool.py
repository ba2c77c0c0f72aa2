"""Cells over processes: in this one, in spawned ones of our own, or over an executor that the caller brings."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from dsdistill.data import ImageSource
from dsdistill.data.workers import _main_left_alone
from dsdistill.errors import DistillError, InvalidSetting
from dsdistill.studies.halting import AT_ONCE, Halted, Interruption
from dsdistill.studies.worker import SOURCES, Outcome, Task, cores, failed_line, run_cell

_DEATHS = 2  # a cell that kills its process as often is left alone for this call
_POLL = 0.2


class WorkerKilled(DistillError):
    """The process that worked on a cell died without a word."""


def in_this_process(
    tasks: Sequence[Task], devices: Sequence[str], stop: Interruption
) -> Iterator[tuple[Task, Outcome]]:
    """One after the other, here, on the first device."""
    for task in tasks:
        if stop.signum is not None:
            return
        yield task, run_cell(replace(task, device=devices[0] if devices else None))


def over_executor(
    executor: Executor, tasks: Sequence[Task], window: int, devices: Sequence[str], stop: Interruption
) -> Iterator[tuple[Task, Outcome]]:
    """Over the caller's executor, of which only ``submit`` is used; devices are dealt out in turn.

    Raises:
        BrokenExecutor: it lost a process and takes no more tasks; the tasks in flight are told of as failed before.
    """
    turn = cycle(devices or (None,))
    placed = deque(replace(task, device=next(turn)) for task in tasks)
    flight = _Flight(executor.submit, run_cell, window, stop)
    yield from flight.outcomes(placed)
    if flight.broken is not None and placed and stop.signum is None:
        raise flight.broken


@dataclass(frozen=True)
class OwnPool:
    """Spawned processes: each takes the next of ``devices`` in turn and keeps to it, and opens the images once.

    A process that dies takes the cells in flight with it: they are told of as failed, the processes are made anew, and
    once the others are done each of them is tried again, alone, so that it is known which one kills.

    Args:
        workers: number of processes; they share the cores.
        source: images for tasks that only know their key, sent to each process once.
    """

    workers: int
    devices: Sequence[str]
    stop: Interruption
    source: tuple[str, ImageSource] | None

    def outcomes(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Tasks with how they ended, as they end; a task may fail and then end otherwise."""
        untried, suspects = deque(tasks), deque[Task]()
        deaths: Counter[str] = Counter()
        with_main = needs_main((tasks, self.source))
        while (untried or suspects) and self.stop.signum is None:
            queue, window = (untried, self.workers) if untried else (suspects, 1)
            with self._pool(window, with_main) as submit:
                flight = _Flight(submit, _run_in_pool, window, self.stop)
                for task, outcome in flight.outcomes(queue):
                    if any(task is killed for killed in flight.killed):
                        deaths[task.cell.key] += 1
                        if deaths[task.cell.key] < _DEATHS:
                            suspects.append(task)
                    yield task, outcome

    @contextmanager
    def _pool(self, window: int, with_main: bool) -> Iterator[Callable[..., "Future[Outcome]"]]:
        context = multiprocessing.get_context("spawn")
        equipment = _Equipment(
            threads=max(1, cores() // self.workers),
            devices=tuple(self.devices),
            source=self.source,
            stop=self.stop.file,
        )
        pool = ProcessPoolExecutor(window, context, initializer=_prepare, initargs=(equipment, context.Value("i", 0)))

        def submit(function: Callable[[Task], Outcome], task: Task) -> "Future[Outcome]":
            with nullcontext() if with_main else _main_left_alone():
                return pool.submit(function, task)

        try:
            yield submit
        except BaseException:
            self.stop.now()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _Flight:
    """Tasks under way: at most ``window`` at a time, none new once the study was asked to stop.

    ``killed`` are the tasks lost when the executor broke, ``broken`` is what it said.
    """

    def __init__(
        self,
        submit: Callable[..., "Future[Outcome]"],
        function: Callable[[Task], Outcome],
        window: int,
        stop: Interruption,
    ) -> None:
        self._submit, self._function, self._window, self._stop = submit, function, window, stop
        self._waiting: dict[Future[Outcome], Task] = {}
        self.killed: list[Task] = []
        self.broken: BrokenExecutor | None = None

    def outcomes(self, tasks: deque[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Take tasks from the left of a queue; those that were not begun are left in it."""
        while True:
            self._fill(tasks)
            if self._stop.signum is not None:
                self._cancel()
            if not self._waiting:
                return
            # Not for long: a signal may ask for what is queued to be cancelled.
            for future in wait(self._waiting, timeout=_POLL, return_when=FIRST_COMPLETED).done:
                task = self._waiting.pop(future)
                yield task, self._outcome(task, future)

    def _fill(self, tasks: deque[Task]) -> None:
        while tasks and len(self._waiting) < self._window and self._stop.signum is None and self.broken is None:
            try:
                future = self._submit(self._function, tasks[0])
            except BrokenExecutor as error:
                self.broken = error
                return
            self._waiting[future] = tasks.popleft()

    def _cancel(self) -> None:
        self._waiting = {future: task for future, task in self._waiting.items() if not future.cancel()}

    def _outcome(self, task: Task, future: "Future[Outcome]") -> Outcome:
        try:
            return future.result()
        except BrokenExecutor as error:
            self.broken = error
            if self._stop.signum is not None:
                return Outcome(stopped=self._stop.signum)
            self.killed.append(task)
            killed = WorkerKilled(
                "the process that worked on it, or another one beside it, was killed; if it runs out of memory, "
                "use fewer workers"
            )
            return Outcome(failed_line(task, killed), trace=f"{killed}\n{error}\n")
        except (CancelledError, Halted) as error:
            return Outcome(stopped=error.signum if isinstance(error, Halted) else signal.SIGTERM)
        except Exception as error:  # of the executor: a task that cannot be sent, say
            return Outcome(failed_line(task, error), trace=f"{type(error).__name__}: {error}\n")


def needs_main(content: object) -> bool:
    """Whether something that is sent to workers is defined in the caller's main script: they must run it again then.

    Raises:
        InvalidSetting: it cannot be sent at all.
    """
    try:
        return b"__main__" in pickle.dumps(content)
    except DistillError:
        raise
    except Exception as error:  # picklers and the objects in their way raise nearly anything
        raise InvalidSetting(
            "workers",
            "processes",
            f"something cannot be sent to them ({error}): define it in a module, or take workers=1",
        ) from error


# -- in each of our processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Equipment:
    threads: int
    devices: tuple[str, ...]
    source: tuple[str, ImageSource] | None
    stop: Path


class _Worker:
    """State of one of our processes: its device, and whether a task is at work."""

    device: str | None = None
    busy = False


def _prepare(equipment: _Equipment, arrivals: Any) -> None:
    # Ctrl-C reaches the whole group of processes; the parent decides what becomes of it.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    torch.set_num_threads(min(torch.get_num_threads(), equipment.threads))
    with arrivals.get_lock():
        number, arrivals.value = arrivals.value, arrivals.value + 1
    if equipment.devices:
        _Worker.device = equipment.devices[number % len(equipment.devices)]
    if equipment.source is not None:
        SOURCES.give(*equipment.source)
    threading.Thread(target=_watch, args=(equipment.stop,), daemon=True).start()


def _watch(stop: Path) -> None:
    """Interrupt this process when the study is to stop, and end it when it must be at once or the parent is gone."""
    parent = multiprocessing.parent_process()
    asked = False
    while parent is not None and not wait_for([parent.sentinel], timeout=_POLL):
        try:
            text = stop.read_text()
        except OSError:  # not there: the usual case
            continue
        if text == AT_ONCE:
            break
        if not asked and _Worker.busy:
            asked = True
            os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)


def _run_in_pool(task: Task) -> Outcome:
    _Worker.busy = True
    outcome = run_cell(replace(task, device=_Worker.device), patient=True)
    _Worker.busy = False
    if outcome.stopped is not None:
        # A pool that has lost a process signals the others, and waits for them to end: from Python 3.12 on in vain,
        # if one then waited for another task.
        os._exit(128 + outcome.stopped)
    return outcome
