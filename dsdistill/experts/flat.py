"""Experts of FTD (Du et al., Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation, arXiv
2211.11004).

A trajectory through flat regions forgives a student that does not start exactly on it. Each step looks at the gradient
where the loss nearby is highest (sharpness-aware minimisation), and leaves out what of the gradient here is orthogonal
to it (its generalised form, GSAM, arXiv 2203.08065)::

    g   = ∇ℓ(θ; A(B))
    e   = ρ θ²⊙g / ‖ |θ|⊙g ‖   (adaptive),   or   ρ g / ‖g‖
    g_p = ∇ℓ(θ + e; A(B))                     the same views
    v   = g − (gᵀg_p / ‖g_p‖²) g_p
    d   = g_p − α v

ρ is constant because the step size is. Departure from the authors' code: nothing is added to the denominators; where a
gradient is exactly zero, so are e and v.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.experts.base import Batch, ExpertTraining, Learner


@dataclass(frozen=True, kw_only=True)
class FlatTraining(ExpertTraining, continues=True):
    """Sharpness-aware steps in their generalised form (GSAM), as for the experts of FTD (arXiv 2211.11004) and DATM."""

    rho: Annotated[float, Ge(0)] = 0.01
    """ρ, how far the second look is; relative to each parameter's size if adaptive. 0 gives plain experts."""
    alpha: Annotated[float, Ge(0)] = 1.0
    """α, how much of the orthogonal part is left out (FTD: 0.3 or 1, DATM: 0.3); 0 gives sharpness-aware steps."""
    adaptive: bool = True
    """Look further along parameters that are large."""

    def direction(self, learner: Learner, theta: Tensor, batch: Batch, factor: Tensor) -> Tensor:
        here = learner.slope(theta, batch)
        there = learner.slope(theta + ascent(theta, here, self.rho, adaptive=self.adaptive), batch)
        return there - self.alpha * orthogonal(here, there)


def ascent(theta: Tensor, gradient: Tensor, rho: float, *, adaptive: bool) -> Tensor:
    """e (P,): where within ρ of θ (P,) a loss with this gradient (P,) is highest, to first order."""
    if adaptive:
        return rho * _divided(theta.square() * gradient, torch.linalg.vector_norm(theta * gradient))
    return rho * _divided(gradient, torch.linalg.vector_norm(gradient))


def orthogonal(vector: Tensor, to: Tensor) -> Tensor:
    """The part of a vector (P,) orthogonal to another (P,)."""
    return vector - _divided(vector @ to * to, to @ to)


def _divided(vector: Tensor, length: Tensor) -> Tensor:
    return vector / length.clamp_min(torch.finfo(length.dtype).tiny)  # where it is 0, the vector is, too
