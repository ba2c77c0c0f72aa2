"""Methods made to exercise the engine, and a run that a test may kill."""

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


if __name__ == "__main__":  # python toys.py OUT: a DM run slow enough to be killed in the middle
    import time

    from dsdistill import synthesize
    from dsdistill.methods import DM
    from dsdistill.networks import NetworkSpec
    from dsdistill.testing import toy_source

    torch.set_num_threads(1)
    pause = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    method = DM(ipc=2, iterations=60, real_batch=4, network=NetworkSpec(width=8))
    synthesize(
        method,
        toy_source(),
        device="cpu",
        out=sys.argv[1],
        checkpoint_every=3,
        callback=lambda event: (print(event.iteration, flush=True), time.sleep(pause)),
    )
