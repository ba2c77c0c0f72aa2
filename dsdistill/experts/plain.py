"""Experts of MTT (Cazenavette et al., Dataset Distillation by Matching Training Trajectories, arXiv 2203.11932)::

    d = ∇ℓ(θ; A(B)),    lr = 0.01,  μ = 0,  no penalty

ℓ is the mean cross-entropy, A(B) a mini-batch under views. There is neither momentum nor a schedule, because the
student that imitates an expert has none: such experts end at about 79 % on whitened CIFAR-10 (77 % without whitening),
far below what the network can reach.
"""

from dataclasses import dataclass

from torch import Tensor

from dsdistill.experts.base import Batch, ExpertTraining, Learner


@dataclass(frozen=True, kw_only=True)
class PlainTraining(ExpertTraining, continues=True):
    """SGD with a constant step size, as for the experts of MTT (arXiv 2203.11932) and TESLA."""

    def direction(self, learner: Learner, theta: Tensor, batch: Batch, factor: Tensor) -> Tensor:
        return learner.slope(theta, batch)
