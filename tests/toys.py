"""Methods made to exercise the engine, and a run that a test may kill."""

import os
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from dsdistill.engine import Job, PerClass, State
from dsdistill.labels import HardLabels
from dsdistill.parameterizations import Pixels


@dataclass(frozen=True, kw_only=True)
class Wander(PerClass):
    """Random walk from noise, one job per class; draws from named streams and from the global generator."""

    paper: ClassVar[str] = "none"
    iterations: int = 6
    bad_at: int = -1
    """Iteration that reports a NaN loss."""
    poison_at: int = -1
    """Iteration that leaves a NaN in the images but reports a finite loss."""
    one_job: bool = False

    @property
    def steps(self):
        return self.iterations

    def jobs(self, run):
        return super().jobs(run) if self.one_job else [Job(f"class/{c}", (c,)) for c in run.classes]

    def start(self, run, job):
        labels = HardLabels(torch.tensor(run.classes).repeat_interleave(self.ipc), run.source.num_classes)
        images = Pixels(torch.rand(labels.count, *run.source.shape, generator=run.rng.at("init")))
        optimizer = torch.optim.Adam(images.parameters(), lr=0.1)
        return State(images, labels, {"images": optimizer}, {"average": torch.zeros(3), "head": torch.nn.Linear(2, 1)})

    def step(self, run, state, iteration):
        noise = torch.rand(state.images.pixels.shape, generator=run.rng.at("noise", iteration))
        state.images.pixels.grad = noise - torch.rand(())
        state.optimizers["images"].step()
        state.extras["average"] += torch.rand(3)
        if iteration == self.poison_at:
            state.images.pixels.data[0, 0, 0, 0] = torch.nan
        return {"loss": torch.tensor(torch.nan if iteration == self.bad_at else float(iteration))}


def slow_run(out, callback):
    """A DM run with a checkpoint after every third step."""
    from dsdistill import synthesize
    from dsdistill.methods import DM
    from dsdistill.networks import NetworkSpec
    from dsdistill.testing import toy_source

    method = DM(ipc=2, iterations=60, real_batch=4, network=NetworkSpec(width=8))
    synthesize(method, toy_source(), device="cpu", out=out, checkpoint_every=3, callback=callback)


def fork_runs():
    """Make that run for every line "PAUSE OUT" of the input, each in a fork that tells its id and its steps.

    An interpreter starts slower than they run.
    """
    import time

    from faults.nursery import ended, forked

    from dsdistill import methods, synthesize
    from dsdistill.testing import toy_source

    methods.get_method("DM")
    synthesize(Wander(ipc=1), toy_source(), device="cpu")  # libraries are loaded by it; no backward pass, as it forks

    def run(out, pause):
        def tell(event):
            print("step", event.iteration, flush=True)
            time.sleep(pause)

        print("process", os.getpid(), flush=True)
        slow_run(out, tell)

    for line in sys.stdin:
        pause, out = line.rstrip("\n").split(" ", 1)
        print("ended", ended(forked(lambda: run(out, float(pause)))), flush=True)  # noqa: B023


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_runs()
