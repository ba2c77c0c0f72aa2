"""Matching training trajectories (Cazenavette et al., Dataset Distillation by Matching Training Trajectories, arXiv
2203.11932).

Learns pixels S and a step size β such that a few steps of a student on S lead from where an expert was after t epochs
of training on real images to where it was M epochs later::

    min_{S, β}  E_{θ*, t}  ‖ θ_T − θ*_{t+M} ‖² / ‖ θ*_t − θ*_{t+M} ‖²,
    θ_0 = θ*_t,   θ_{i+1} = θ_i − β ∇_θ ℓ(θ_i; A_i(S_i))

ℓ is the mean cross-entropy over a mini-batch S_i, A_i views drawn anew for each image and step. The gradient is exact,
and by default made in constant memory; ``backward="truncated"`` gives that of TESLA (Cui et al., arXiv 2211.10586).

Departures from the authors' code: β is kept positive (`StepSize`; the same down to where it starts). Experts serve in
random order without regard to files, and networks are never seeded by the clock. Views scale and rotate on the grid of
this package (corners not aligned). No texture mode (a canvas larger than the image). Exactly ``iterations`` updates are
made, and the last one is what is saved, with β; published figures are the best of 51 checkpoints on the test split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsdistill.engine import Job, Metrics, Preset, Run, State
from dsdistill.matching.trajectory import TrajectoryMatching, distance, published
from dsdistill.networks import Outer

_TABLE = "table of hyper-parameters of the authors' code"
_ZCA = f"{_TABLE}; images loaded with zca='unit'"
_AS_CIFAR10 = f"{_TABLE}; images standardised with the mean and deviation of CIFAR-10, see docs/methods/mtt.md"

_TESLA: dict[str, Any] = {"backward": "truncated", "iterations": 10_000}
_SUBSETS = ("nette", "woof", "fruit", "meow", "squawk", "yellow")


@dataclass(frozen=True, kw_only=True)
class MTT(TrajectoryMatching):
    """Trajectory matching: a few steps on the synthetic images lead a network where epochs on real ones led it."""

    paper: ClassVar[str] = (
        "Cazenavette et al., Dataset Distillation by Matching Training Trajectories, CVPR 2022, arXiv 2203.11932"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar10/ipc1": Preset(_ZCA, published(1, 50, 2, 100.0, 1e-7)),
        "cifar10/ipc10": Preset(
            f"{_ZCA}; lr_images as its author corrected it", published(10, 30, 20, 100.0, 1e-5, lr_student=0.001)
        ),
        "cifar10/ipc50": Preset(_TABLE, published(50, 30, 40, 1000.0, 1e-5, lr_student=0.001)),
        "cifar100/ipc1": Preset(_ZCA, published(1, 20, 20, 1000.0, 1e-5, expert_epochs=3)),
        "cifar100/ipc10": Preset(_AS_CIFAR10, published(10, 20, 20, 1000.0, 1e-5)),
        "cifar100/ipc50": Preset(_ZCA, published(50, 80, 40, 1000.0, 1e-5, batch_size=125)),
        "tiny_imagenet/ipc1": Preset(_TABLE, published(1, 10, 10, 10_000.0, 1e-4)),
        "tiny_imagenet/ipc10": Preset(_TABLE, published(10, 20, 40, 10_000.0, 1e-4, batch_size=200)),
        "tiny_imagenet/ipc50": Preset(_TABLE, published(50, 20, 40, 10_000.0, 1e-4, batch_size=300)),
        **{
            f"imagenet_{name}/ipc{ipc}": Preset(
                f"{_TABLE}; other values of lr_images, up to 1e5, are public too: try some",
                published(ipc, 20, 10, 1000.0, 1e-6, batch_size=20 if ipc == 10 else None),
            )
            for name in _SUBSETS
            for ipc in (1, 10)
        },
        "cifar10/ipc1/tesla": Preset("command of TESLA's code", published(1, 50, 5, 1000.0, 1e-7, **_TESLA)),
        "cifar100/ipc50/tesla": Preset(
            "command of TESLA's code; images loaded with zca='unit'",
            published(50, 80, 40, 1000.0, 1e-5, batch_size=125, **_TESLA),
        ),
    }

    def start(self, run: Run, job: Job) -> State:
        return self.begin(run, *self.random_real(run))

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        segment = self.segment(run, iteration)
        start, target = segment.after(0, self.expert_epochs)
        outer = Outer(lambda ends: distance(ends[0], start, target), (self.student_steps,))
        loss = self.follow(run, state, iteration, start, outer)
        self.update(state)
        return self.told(state, segment, loss)
