"""The loss of a learned variance (Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2102.09672).

A DiT says of each number of a latent, beside the noise, a share v of its variance between the least and the largest::

    Σ = exp(v log β_t + (1 − v) log β̃_t),      β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)

It is fitted by the variational bound, to which the mean that follows from the predicted noise is a constant::

    L_t = KL(q(x_{t−1} | x_t, x₀) ‖ N(μ, Σ)) / log 2,     L_0 = −log₂ p(x₀ | x₁)     (means over the numbers)

with x₀ known to 1/255, as if it were a pixel in [−1, 1]: so it is in the code of DiT too, whose x₀ are latents.
"""

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dsdistill.generative.denoiser import Schedule

_BIN = 1 / 255


def variance_bound(schedule: Schedule, raw: Tensor, latents: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
    """Its mean over a batch, in bits; differentiable in the variance alone.

    Args:
        raw: (B, 2 c, g, g), what a denoiser said of ``noisy``.
        latents: (B, c, g, g), scaled.
        noisy: x_t.
        times: (B,), of all T levels.
    """
    channels = latents.shape[1]
    tables = _tables.setdefault(schedule, {})
    place = (latents.device, latents.dtype)
    if place not in tables:
        tables[place] = _Tables(*(one.to(*place) for one in _Tables.of(schedule.kept)))
    log_beta, lowest, of_clean, of_noisy = (one[times].view(-1, 1, 1, 1) for one in tables[place])
    clean = schedule.clean(raw[:, :channels].detach(), noisy, times)[0]
    share = (raw[:, channels:] + 1) / 2
    log_variance = share * log_beta + (1 - share) * lowest
    mean, true_mean = (of_clean * one + of_noisy * noisy for one in (clean, latents))
    ratio = lowest - log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean) ** 2 * (-log_variance).exp())
    at_once = -_log_likelihood(latents, mean, 0.5 * log_variance)
    bits = torch.where((times == 0).view(-1, 1, 1, 1), at_once, divergence) / math.log(2)
    return bits.mean()


class _Tables(NamedTuple):
    """By time (T,): log β, log β̃, and what x₀ and x_t have of the mean."""

    log_beta: Tensor
    lowest: Tensor
    of_clean: Tensor
    of_noisy: Tensor

    @classmethod
    def of(cls, kept: Tensor) -> "_Tables":
        before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
        beta = 1 - kept / before
        least = beta * (1 - before) / (1 - kept)
        # At the last step the least variance is 0, whose logarithm is taken one level earlier, as in the code of DiT.
        lowest = torch.cat([least[1:2], least[1:]]).log()
        shares = before.sqrt() * beta / (1 - kept), (1 - beta).sqrt() * (1 - before) / (1 - kept)
        return cls(beta.log(), lowest, *shares)


_tables: "WeakKeyDictionary[Schedule, dict[tuple[torch.device, torch.dtype], _Tables]]" = WeakKeyDictionary()


def _log_likelihood(values: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Of what rounds to ``values``; the outermost bins reach to infinity."""
    above, below = ((values + side * _BIN - mean) * (-log_deviation).exp() for side in (1, -1))
    inner = torch.special.ndtr(above) - torch.special.ndtr(below)
    inside = inner.clamp_min(1e-12).log()
    outer = torch.where(values < 0, torch.special.log_ndtr(above), torch.special.log_ndtr(-below))
    return torch.where(values.abs() > 0.999, outer.clamp_min(math.log(1e-12)), inside)
