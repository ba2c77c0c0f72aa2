"""Many small tasks in a few spawned processes, which may be killed without losing the rest."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

logger = logging.getLogger("dsdistill")
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class WorkersKilled(Exception):
    """Processes died twice. ``tasks``: the numbers of those in progress the second time."""

    def __init__(self, tasks: Sequence[int]) -> None:
        self.tasks = tuple(tasks)
        super().__init__(f"processes died while working on the tasks {self.tasks}")


def run(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int, name: str
) -> Iterator[tuple[int, _Result]]:
    """Results with the numbers of their tasks, as they are finished; ``tasks`` are made when they are needed.

    After the death of a process the unfinished tasks are tried once more.

    Args:
        function: of a module that can be imported; with one worker called in this process.
        tasks: picklable.
        workers: number of processes.
        name: for the log.

    Raises:
        WorkersKilled: a process died again.
    """
    if workers == 1:
        yield from ((number, function(tasks[number])) for number in range(len(tasks)))
        return
    left = dict.fromkeys(range(len(tasks)))
    started: dict[Future[_Result], int] = {}
    for last in (False, True):
        started.clear()
        try:
            for number, result in _once(function, tasks, list(left), workers, started):
                del left[number]
                yield number, result
            return
        except BrokenProcessPool:
            if last:
                raise WorkersKilled(sorted(started.values())) from None
            logger.warning("%s: a process that decodes images was killed; trying once more", name)


def _once(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    numbers: list[int],
    workers: int,
    started: dict[Future[_Result], int],
) -> Iterator[tuple[int, _Result]]:
    waiting = iter(numbers)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(workers, len(numbers))), mp_context=context, initializer=_prepare)
    try:
        while True:
            while len(started) < 2 * workers and (number := next(waiting, None)) is not None:
                with _main_left_alone():
                    started[pool.submit(function, tasks[number])] = number
            if not started:
                return
            for future in wait(started, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield started.pop(future), result
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Spawned processes run the caller's main script again, which ours have no use for: it would load torch in each,
    and without an ``if __name__ == "__main__"`` begin all over. Where there is no file, there is nothing to run.
    """
    main = sys.modules["__main__"]
    hidden = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    try:
        for name in hidden:
            setattr(main, name, None)
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def _prepare() -> None:
    """In each process: leave Ctrl-C to the parent, and end with it, even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
