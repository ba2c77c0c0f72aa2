"""Experts of AST (Shen, Yang & Lam, AST: Effective Dataset Distillation through Alignment with Smooth and High-Quality
Expert Trajectories, arXiv 2310.10541), as in its authors' code; the text was not read::

    d = ∇ [ s_k ℓ(θ; A(B)) + λ / (B·H·W) Σ_{image, pixel} ( ‖∂ Σ_c f_c(x; θ) / ∂x_pixel‖ − 1 )² ]
    s_k = 0.50, 0.55, ..., 0.95 in epochs k = 0 ... 9, then 1          ("clipping loss": smaller steps at first)
    lr  = 0.003, times 0.6 from epoch ⌊E/2⌋ + 2 on, where v starts anew;   μ = 0.9, L2 penalty 0.001

f are the logits, x the images of the batch without views; the norm is taken over the color channels of a pixel. The
penalty keeps the change of the network from step to step small; it takes a second derivative, and about three times as
long as plain training. Versions of the code differ in λ (0.1 to 2), the drop (0.6 or 0.7) and s: all are settings but
an older list of s, 0.50, 0.50, 0.55, 0.55, 0.60, ..., 0.90, whose steps are not equal.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from dsdistill.experts.base import Batch, ExpertTraining, Learner


@dataclass(frozen=True, kw_only=True)
class SmoothTraining(ExpertTraining):
    """SGD with momentum, a ramp of the loss and a gradient penalty, as for the experts of AST (arXiv 2310.10541).

    When the step size drops depends on ``epochs``, so experts of few are not the beginning of those of more.
    """

    lr: Annotated[float, Gt(0)] = 0.003
    """Initial step size."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """SGD momentum; it starts anew where the step size drops."""
    weight_decay: Annotated[float, Ge(0)] = 1e-3
    """L2 penalty."""
    lr_drop: Annotated[float, Gt(0), Le(1)] = 0.6
    """Factor of the step size, once, from 2 epochs after half of ``epochs`` on."""
    ramp_start: Annotated[float, Gt(0), Le(1)] = 0.5
    """Factor of the loss in the first epoch."""
    ramp_epochs: Annotated[int, Ge(0)] = 10
    """Epochs in which that factor rises to 1."""
    penalty: Annotated[float, Ge(0)] = 2.0
    """λ, weight of the gradient penalty; 0 leaves it out."""
    penalty_target: Annotated[float, Ge(0)] = 1.0
    """The norm that it draws the gradient of each pixel to."""

    def direction(self, learner: Learner, theta: Tensor, batch: Batch, factor: Tensor) -> Tensor:
        count = len(batch.targets)

        def loss(theta: Tensor, clean: Tensor, shown: Tensor, targets: Tensor) -> Tensor:
            fit = learner.network.loss(theta, shown, targets) * factor
            return (fit + self._roughness(learner, theta, clean) if self.penalty else fit) / count

        return learner.gradient(loss, theta, *batch)

    def _roughness(self, learner: Learner, theta: Tensor, images: Tensor) -> Tensor:
        """λ times the penalty, averaged over pixels and summed over images."""
        slopes = torch.func.grad(lambda images: learner.network(theta, images).sum())(images)
        norms = torch.linalg.vector_norm(slopes, dim=1)
        rough: Tensor = self.penalty * (norms - self.penalty_target).square().mean((1, 2)).sum()
        return rough

    def loss_factor(self, epoch: int) -> float:
        """s_k, during ``epoch`` (counted from 0)."""
        done = epoch / self.ramp_epochs if epoch < self.ramp_epochs else 1.0
        return self.ramp_start + (1 - self.ramp_start) * done

    def learning_rate(self, epoch: int) -> float:
        return self.lr * self.lr_drop if epoch >= self._drop else self.lr

    def restarts(self, epoch: int) -> bool:
        return epoch in (0, self._drop)

    @property
    def _drop(self) -> int:
        return self.epochs // 2 + 2
