"""Alignment with smooth experts (Shen, Yang & Lam, AST: Effective Dataset Distillation through Alignment with Smooth
and High-Quality Expert Trajectories, arXiv 2310.10541).

Experts with momentum and a schedule are better networks, but a student of plain steps cannot follow them. AST smooths
their training (`SmoothTraining`) and helps the student (θ_0, T, M, β as in `dsdistill.methods.mtt`)::

    θ_0    = θ*_t + a θ*_t ⊙ ξ / ‖ξ‖   for weights of convolutions, ξ ~ N(0, 1)            perturbed start
    v_i    = 0.9 v_{i−1} + s(t) ∇_θ ℓ(θ_i; A_i(S_i)),   θ_{i+1} = θ_i − β v_i              balanced inner loss
    L      = Σ_{j=1..M} w_j ‖ θ_{τ_j} − θ*_{t+j} ‖² / ‖ θ_0 − θ*_{t+j} ‖²,  τ_j = j ⌊T/M⌋, τ_M = T
    s(t)   = log₅(t − h + 8) where t ≥ h = ⌊T⁺/2⌋,  else 1 / log₅(h − t + 8)

with w_j = 1 ("aggregate") or j/M ("adaptive"), and S starts from representative images: those nearest to the centres of
10 clusters of each class, in what an expert makes of them.

All of these formulas are those of the authors' code, not of the paper's text, which was not read. Inferred beyond the
code: below 10 images per class, where it selects none, there are as many clusters as images; what division leaves
over goes to the largest clusters; no image is taken twice. The expert that clusters is the first one, after the last
epoch that is looked at; the code takes a random one after its last epoch. Left out, as they are off in the recipes: a
graph of the last 8 steps alone, and alignment of features at the end. Published accuracies are the best over epochs of
one network on the test split, so not comparable.

Which experts the rows of the authors' scripts had is uncertain. The script that trains experts fills the folder that
those of CIFAR-100 at IPC 1 and 10 read: 50 experts without penalty, whose loss was then always ramped (0.5, 0.5, 0.55,
0.55, 0.6, 0.65, ... 0.9). The other scripts name folders that nothing fills; the README makes 100 experts with penalty
and ramp. Presets have those of the README.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, Preset, Run, State
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Experts, SmoothTraining
from dsdistill.matching.trajectory import TrajectoryMatching, distance, published
from dsdistill.networks import FlatNetwork, Outer
from dsdistill.networks.rules import SGD
from dsdistill.selection import class_outputs, pick

_README = "README of the authors' code; images loaded with zca='unit'"
_SCRIPTS = "scripts of the authors' code, which leave open what experts they had"
_SCRIPTS_100 = f"{_SCRIPTS}; images standardised with the mean and deviation of CIFAR-10, see docs/methods/ast.md"


@dataclass(frozen=True, kw_only=True)
class AST(TrajectoryMatching):
    """Smooth experts: strong experts that can be followed, from representative images, with stops on the way."""

    paper: ClassVar[str] = (
        "Shen, Yang & Lam, AST: Effective Dataset Distillation through Alignment with Smooth and High-Quality Expert "
        "Trajectories, arXiv 2310.10541"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar100/ipc1": Preset(_README, published(1, 20, 20, 1000.0, 1e-5, expert_epochs=3)),
        "cifar100/ipc1/script": Preset(_SCRIPTS_100, published(1, 40, 15, 100.0, 1e-5, expert_epochs=3, balance=False)),
        "cifar100/ipc10": Preset(_SCRIPTS_100, published(10, 20, 30, 1000.0, 1e-5, balance=False, batch_size=128)),
        "cifar100/ipc50": Preset(
            _SCRIPTS_100,
            published(50, 80, 40, 1000.0, 1e-5, balance=False, perturbation=0.0, intermediate="none", batch_size=700),
        ),
        "cifar10/ipc10": Preset(
            f"{_SCRIPTS}, one of two; images loaded with zca='unit'", published(10, 30, 20, 100.0, 1e-6, init="random")
        ),
        "tiny_imagenet/ipc1": Preset(_SCRIPTS, published(1, 10, 10, 10_000.0, 1e-4, balance=False, init="random")),
    }

    experts: Experts = Experts(training=SmoothTraining())
    """Networks trained on the real images: how many, and how."""
    init: Literal["representative", "random"] = "representative"
    """Which real images S starts from: those near the centres of clusters, or any."""
    momentum_student: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of the student's steps, that of the experts."""
    balance: bool = True
    """Whether the student's loss is weighted by s(t): larger steps in late segments, smaller ones in early ones."""
    intermediate: Literal["aggregate", "adaptive", "none"] = "aggregate"
    """Weights w_j of the epochs on the way: 1, j/M, or 0 for all but the last."""
    perturbation: Annotated[float, Ge(0)] = 1.0
    """a, size of the noise on the weights that a student starts from; 0 for none."""

    @property
    def student_momentum(self) -> float:
        """Momentum of the student's steps."""
        return self.momentum_student

    def check(self, source: ImageSource) -> None:
        """Refuse a student with fewer steps than stops, and what `TrajectoryMatching.check` refuses.

        Raises:
            BadData, InvalidSetting: see there.
        """
        super().check(source)
        if self.intermediate != "none" and self.student_steps < self.expert_epochs:
            allowed = (
                f"at least expert_epochs={self.expert_epochs}, as it is compared with each of them; lower that, or set "
                "intermediate='none'"
            )
            raise InvalidSetting("AST.student_steps", self.student_steps, allowed)

    def start(self, run: Run, job: Job) -> State:
        if self.init == "random":
            return self.begin(run, *self.random_real(run))
        trajectories = self.trajectories(run)
        theta = trajectories.snapshots(0, [self.last_epoch])[0]
        logits = class_outputs(run, partial(trajectories.network, theta))
        chosen = pick(run, "representative", logits, self.form.images_per_class(self.ipc))
        return self.begin(run, *self.made_of(run, chosen))

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        segment = self.segment(run, iteration)
        start, *targets = segment.after(*range(self.expert_epochs + 1))
        start = perturbed(
            segment.trajectories.network, start, self.perturbation, run.rng.at("perturbation", iteration, device="cpu")
        )
        stops, weights = self.stops
        at_last: list[Tensor] = []

        def loss(states: Sequence[Tensor]) -> Tensor:
            apart = [distance(state, start, targets[j - 1]) for state, j in zip(states, weights, strict=True)]
            at_last[:] = [apart[-1].detach()]
            return torch.stack([weights[j] * one for one, j in zip(apart, weights, strict=True)]).sum()

        factor = balance(segment.epoch, self.max_start_epoch) if self.balance else 1.0
        found = self.follow(
            run, state, iteration, start, Outer(loss, stops), rule=SGD(momentum=self.student_momentum), factor=factor
        )
        self.update(state)
        return {**self.told(state, segment, found), "distance": at_last[0]}  # the loss of other trajectory methods

    @property
    def stops(self) -> tuple[tuple[int, ...], dict[int, float]]:
        """After which steps τ_j the student is compared, and the weight w_j of each epoch j it is compared with."""
        steps, epochs = self.student_steps, self.expert_epochs
        weights = {epochs: 1.0}
        if self.intermediate != "none":
            weights = {j: 1.0 if self.intermediate == "aggregate" else j / epochs for j in range(1, epochs + 1)}
        return tuple(steps if j == epochs else j * (steps // epochs) for j in weights), weights


def balance(epoch: int, end: int) -> float:
    """s(t), the factor of a student's loss that starts after ``epoch``, where starts lie below ``end``.

    Example:
        >>> round(balance(0, 20), 3), round(balance(10, 20), 3), round(balance(19, 20), 3)
        (0.557, 1.292, 1.76)
    """
    half = end // 2
    return math.log(epoch - half + 8, 5) if epoch >= half else 1 / math.log(half - epoch + 8, 5)


def perturbed(network: FlatNetwork, theta: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """θ (P,) with noise on the weights of convolutions: w + size·w ⊙ ξ / ‖ξ‖, ξ ~ N(0, 1), the norm taken per layer."""
    if size == 0:
        return theta
    parts = []
    for part in network.split(theta):
        if part.dim() == 4:
            noise = torch.randn(part.shape, generator=generator).to(part)
            part = part + size * part * noise / noise.norm()
        parts.append(part.reshape(-1))
    return torch.cat(parts)
