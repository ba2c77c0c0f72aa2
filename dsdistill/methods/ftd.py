"""Flat trajectory distillation (Du et al., Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation,
arXiv 2211.11004).

A network that scores the set starts from random weights, not from an expert's, so that what a student errs in one
segment changes where the next begins. These errors do less harm where the loss is flat. FTD therefore matches
trajectories (see `dsdistill.methods.mtt`) of experts trained for flatness (`FlatTraining`)::

    min_{S, β}  E_{θ*, t}  ‖ θ_T − θ*_{t+M} ‖² / ‖ θ*_t − θ*_{t+M} ‖²,     θ* from FlatTraining

and stores a moving average of the images, S̄ ← d S̄ + (1 − d) S after each step, starting at S̄ = S. The step size β and
labels are not averaged.

Whether images are whitened, the authors' table does not say: two of their commands do it (CIFAR-10 and CIFAR-100, 10
images per class); the other presets follow MTT's. It has no row for subsets of ImageNet, so there is no preset either.

Departures from the authors' code: as for MTT. There the averaged images are scored by the very networks that were just
trained on the others; here networks are always fresh. At IPC 1 (d = 0.9999) the average after 5000 steps is still to
61 % made of the images it started from.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import nn

from dsdistill.engine import Job, Metrics, Preset, Run, State
from dsdistill.experts import Experts, FlatTraining
from dsdistill.matching.trajectory import TrajectoryMatching, distance, published
from dsdistill.networks import Outer
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
_TABLE = "table of hyper-parameters of the authors' code"
_WHITE = f"{_TABLE}; images loaded with zca='unit', as by its command"
_WHITE_AS_MTT = f"{_TABLE}; images loaded with zca='unit', which it leaves open, as for MTT"
_RAW_AS_MTT = f"{_TABLE}; images not whitened, which it leaves open, as for MTT"


def _with(alpha: float, average: float, **more: Any) -> dict[str, Any]:
    return {"experts": Experts(training=FlatTraining(rho=0.01, alpha=alpha)), "average": average, **more}


@dataclass(frozen=True, kw_only=True)
class FTD(TrajectoryMatching):
    """Flat trajectories: experts trained for flat minima, and a moving average of the images."""

    paper: ClassVar[str] = (
        "Du et al., Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation, CVPR 2023, "
        "arXiv 2211.11004"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar10/ipc1": Preset(_WHITE_AS_MTT, published(1, 50, 2, 100.0, 1e-7, **_with(0.3, 0.9999))),
        "cifar10/ipc10": Preset(_WHITE, published(10, 30, 20, 100.0, 1e-5, **_with(0.3, 0.9995, lr_student=0.001))),
        "cifar10/ipc50": Preset(_RAW_AS_MTT, published(50, 30, 40, 1000.0, 1e-5, **_with(1.0, 0.999))),
        "cifar100/ipc1": Preset(
            _WHITE_AS_MTT, published(1, 40, 20, 1000.0, 1e-5, **_with(1.0, 0.9995, expert_epochs=3))
        ),
        "cifar100/ipc10": Preset(_WHITE, published(10, 20, 40, 1000.0, 1e-5, **_with(1.0, 0.9995))),
        "cifar100/ipc50": Preset(
            _WHITE_AS_MTT, published(50, 80, 40, 1000.0, 1e-5, **_with(1.0, 0.999, batch_size=1000))
        ),
        "tiny_imagenet/ipc1": Preset(_RAW_AS_MTT, published(1, 30, 10, 10_000.0, 1e-4, **_with(1.0, 0.999))),
        "tiny_imagenet/ipc10": Preset(
            _RAW_AS_MTT, published(10, 20, 40, 10_000.0, 1e-4, **_with(1.0, 0.999, batch_size=500))
        ),
    }

    experts: Experts = Experts(training=FlatTraining())
    """Networks trained on the real images: how many, and how."""
    average: Annotated[float, Ge(0), Lt(1)] = 0.9995
    """d, decay of the moving average of the images; it reaches back 1 / (1 − d) steps."""
    store: Literal["average", "last"] = "average"
    """Which images the set holds: their moving average, or those of the last step."""

    def prepare(self, run: Run) -> None:
        """As in `TrajectoryMatching`; says so where the moving average hardly leaves the images it starts from."""
        start = self.average**self.iterations
        if self.store == "average" and start > 0.5 and run.shared.rehearsal is None:  # which prepares several times
            logger.warning(
                "FTD.average = %g: after %d iterations, %.0f %% of each stored image is the one it started from: lower "
                "it, or store='last'",
                self.average,
                self.iterations,
                100 * start,
            )
        super().prepare(run)

    def start(self, run: Run, job: Job) -> State:
        state = self.begin(run, *self.random_real(run))
        state.extras["average"] = copy.deepcopy(state.images).to(run.device).requires_grad_(False)
        return state

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        segment = self.segment(run, iteration)
        start, target = segment.after(0, self.expert_epochs)
        outer = Outer(lambda ends: distance(ends[0], start, target), (self.student_steps,))
        loss = self.follow(run, state, iteration, start, outer)
        self.update(state)
        _follow_slowly(state.extras["average"], state.images, self.average)
        return self.told(state, segment, loss)

    def finish(self, run: Run, state: State) -> SyntheticDataset:
        if self.store == "average":
            state = replace(state, images=copy.deepcopy(state.images))
            _follow_slowly(state.images, state.extras["average"], 0.0)
        return super().finish(run, state)


@torch.no_grad()
def _follow_slowly(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move each parameter of ``average`` by 1 − decay of the way; a wrapper of the images has the same ones."""
    for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
