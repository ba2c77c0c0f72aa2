"""Methods that fail or kill, and a study that a test may kill; spawned processes can import this."""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from toys import Wander

from dsdistill import studies
from dsdistill.data import ImageSource
from dsdistill.engine import PerClass, State
from dsdistill.evaluation import get_protocol
from dsdistill.networks import NetworkSpec

NAMES = ("red", "green", "blue")
PROTOCOL = replace(get_protocol("dc"), epochs=3, network=NetworkSpec(width=8, depth=1))


def images(per_class, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(3).repeat_interleave(per_class)
    noise = torch.randint(0, 128, (len(targets), 3, 8, 8), generator=generator)
    return (noise + 50 * targets[:, None, None, None]).to(torch.uint8), targets


def open_test():
    return ImageSource("toy", NAMES, *images(20, seed=1))


def toy_source(seed=0):
    """3 classes, 12 + 20 images each; can be sent to other processes."""
    return ImageSource("toy", NAMES, *images(12, seed), open_test=open_test)


@dataclass(frozen=True, kw_only=True)
class Slow(Wander):
    """A random walk that takes its time, which is no setting: it would make other cells."""

    paper: ClassVar[str] = "none"

    def step(self, run, state, iteration):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        while iteration and "WAIT_FOR" in os.environ and not any(Path(os.environ["WAIT_FOR"]).iterdir()):
            time.sleep(0.01)
        return super().step(run, state, iteration)


@dataclass(frozen=True, kw_only=True)
class Fragile(PerClass):
    """Raises until a file exists."""

    paper: ClassVar[str] = "none"
    cure: str = ""

    def start(self, run, job):
        if not Path(self.cure).exists():
            raise ValueError(f"no cure 💊 for ipc {self.ipc}")
        return State(*self.random_real(run))


@dataclass(frozen=True, kw_only=True)
class Deadly(PerClass):
    """Kills its process as long as there are fewer than ``lives`` files in a folder."""

    paper: ClassVar[str] = "none"
    folder: str = ""
    lives: int = 99
    beside: str = ""
    """A study in which another cell must have made a step before."""

    def start(self, run, job):
        while self.beside and not any(
            log.stat().st_size for log in Path(self.beside).glob("cells/*/run/metrics.jsonl")
        ):
            time.sleep(0.01)
        deaths = len(list(Path(self.folder).iterdir()))
        if deaths < self.lives:
            Path(self.folder, str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return State(*self.random_real(run))


def study(out, workers):
    """Eight cells, half of them of 3 jobs x 6 steps."""
    return studies.grid(
        toy_source(),
        [Slow(), "RandomReal"],
        ipc=(1, 2),
        seeds=2,
        protocol=PROTOCOL,
        epochs=int(os.environ.get("EPOCHS", "3")),
        repeats=2,
        out=out,
        workers=workers,
        devices=["cpu"],
        checkpoint_every=2,
    )


if __name__ == "__main__":  # python actors.py OUT
    torch.set_num_threads(1)
    try:
        study(sys.argv[1], workers=2)
    except studies.StudyStopped as stopped:
        print(stopped)
        sys.exit(stopped.exit_code)
