"""Runs that come to grief. As a script it forks many of them, for an interpreter starts slower than they run.

::

    nursery.py operations OUT EVERY     kill a run before every EVERY-th thing it does to the disk, and run it again
    nursery.py kills OUT COUNT SEED     kill a run COUNT times at random moments, then let it finish
    nursery.py sleep OUT                a run that would sleep for ten minutes in its third step
    nursery.py memory MEBIBYTES CHUNK   a run that may allocate so much more than it already has

The first two end with exit code 0 if the files are those of a run that nobody disturbed, and nothing else is there.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from toys import Wander

from dsdistill import SyntheticDataset, synthesize
from dsdistill.data import ImageSource
from dsdistill.methods import DM
from dsdistill.networks import NetworkSpec
from dsdistill.testing import toy_source

OPERATIONS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
"""Functions of `os` through which files come, change and go."""
FILES = ("images.safetensors", "labels.safetensors", "dataset.json", "README.md", "grid.png")
METHOD = Wander(ipc=1, iterations=3)


@dataclass(frozen=True, kw_only=True)
class Sleeper(Wander):
    """Wander whose third step takes ten minutes."""

    def step(self, run, state, iteration):
        if iteration == 2:
            time.sleep(600)
        return super().step(run, state, iteration)


def two_classes() -> ImageSource:
    """Two classes of two images, so that a run has two jobs."""
    return toy_source(classes=2, per_class=2, shape=(1, 2, 2))


def run(out: Path, method: Wander = METHOD) -> SyntheticDataset:
    """A run of two jobs with a checkpoint after every step."""
    return synthesize(method, two_classes(), device="cpu", out=out, checkpoint_every=1, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a finished set."""
    return {name: (folder / name).read_bytes() for name in FILES}


def left_behind(out: Path) -> list[str]:
    """What should not be in the folder of a finished run."""
    return sorted(path.name for path in out.rglob("*") if path.name.startswith(".tmp-") or path.name == "jobs")


def before_each_operation(act: Callable[[int], None]) -> None:
    """Have ``act`` called with 0, 1, 2, ... before everything that is done to the disk from now on."""
    number = iter(range(10**9))

    def watched(original):
        def operation(*arguments, **options):
            act(next(number))
            return original(*arguments, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))


def forked(work: Callable[[], object]) -> int:
    """Do ``work`` in a fork of this process; its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return process


def ended(process: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def checked(out: Path, expected: dict[str, bytes], when: str) -> None:
    """End this process unless the folder holds the expected set and nothing else."""
    if contents(out) != expected or left_behind(out):
        sys.exit(f"killed {when}: the files differ, or {left_behind(out)} was left behind")


def operations(out: Path, every: int) -> None:
    """Kill a run before each of its operations in turn."""
    run(out / "whole")
    expected = contents(out / "whole")

    def run_and_die(folder: Path, last: int) -> None:
        before_each_operation(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == last else None)
        run(folder)

    number, killed = 0, True
    while killed:
        folder = out / str(number)
        killed = ended(forked(lambda: run_and_die(folder, number))) == -signal.SIGKILL  # noqa: B023
        if ended(forked(lambda: run(folder))) != 0:  # noqa: B023
            sys.exit(f"killed before operation {number}: the run does not go on")
        checked(folder, expected, f"before operation {number}")
        number += every
    print(number)


def kills(out: Path, count: int, seed: int) -> None:
    """Kill a run at random moments."""
    run(out / "whole")
    begin = time.monotonic()
    ended(forked(lambda: run(out / "again")))
    typical = time.monotonic() - begin
    generator = random.Random(seed)
    for number in range(count):
        goal = out / f"cut {number // 4}"  # four kills of one run
        process = forked(lambda: run(goal))  # noqa: B023
        time.sleep(generator.uniform(0, typical))
        os.kill(process, signal.SIGKILL)
        ended(process)
    for goal in sorted(out.glob("cut *")):
        if ended(forked(lambda: run(goal))) != 0:  # noqa: B023
            sys.exit("the run does not go on")
        checked(goal, contents(out / "whole"), "at random")


def memory(mebibytes: int, chunk: int) -> None:
    """A run under a limit of its address space."""
    import resource

    source = toy_source(classes=4, per_class=32, shape=(3, 32, 32))
    small = DM(ipc=1, iterations=1, real_batch=1, network=NetworkSpec(width=8))
    synthesize(small, source, device="cpu", chunk=1)  # libraries are loaded by it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20,) * 2)
    large = DM(ipc=1, iterations=2, real_batch=32, network=NetworkSpec(width=32, depth=1))
    for note in synthesize(large, source, device="cpu", chunk=chunk).recipe.notes:
        print(note)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what a killed process wrote is safe with the system
    mode, *arguments = sys.argv[1:]
    if mode == "operations":
        operations(Path(arguments[0]), int(arguments[1]))
    elif mode == "kills":
        kills(Path(arguments[0]), int(arguments[1]), int(arguments[2]))
    elif mode == "sleep":
        run(Path(arguments[0]), Sleeper(ipc=1, iterations=3))
    else:
        memory(int(arguments[0]), int(arguments[1]))
