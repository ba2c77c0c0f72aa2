"""Distances of characteristic functions (Wang et al., NCFM, arXiv 2502.20653).

The characteristic function of vectors v is Φ(t) = E exp(j⟨t, v⟩): it says everything about their distribution, and at a
given frequency t it is a mean of cosines and sines. So class means of `characters` are values of Φ, real and imaginary.
"""

import torch
from torch import Tensor

from dsdistill.errors import InvalidSetting, ShapeMismatch

SCALE = 300.0
"""Factor of the distance, as in the authors' code."""
_FLOOR = 1e-12  # of the part that depends on phase, whose square root has no slope at 0


def characters(features: Tensor, frequencies: Tensor) -> Tensor:
    """Real and imaginary parts of exp(j⟨t, v⟩), ``(M, D), (n, D) -> (M, 2n)``: n cosines, then n sines.

    Args:
        features: ``(M, D)``, the vectors v.
        frequencies: ``(n, D)``, the arguments t.

    Raises:
        ShapeMismatch: not two matrices of the same width.
    """
    if features.dim() != 2 or frequencies.dim() != 2 or features.shape[1] != frequencies.shape[1]:
        raise ShapeMismatch(
            "frequencies", tuple(frequencies.shape), f"(n, D) beside features (M, D) of {tuple(features.shape)}"
        )
    angles = features @ frequencies.T
    return torch.cat([angles.cos(), angles.sin()], 1)


def characteristic_distance(real: Tensor, synthetic: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """The NCFM loss of class means of `characters`: a mean over frequencies, summed over classes.

    With amplitudes A = |Φ| it is, for each class ::

        300 · mean_t sqrt( α (A_r − A_s)² + β · 2 (A_r A_s − Re Φ_r Re Φ_s − Im Φ_r Im Φ_s) )

    For α = β this is √α · 300 · mean_t |Φ_r − Φ_s|, which is what is computed then: it is 0 for equal means, and as
    smooth as a distance can be. The gradient in equal means is 0. Otherwise the second term has a floor of 1e-12, as in
    the authors' code, so that equal means are √(1e-12 β) · 300 apart.

    Args:
        real: ``(K, 2n)``.
        synthetic: ``(K, 2n)``.
        alpha: weight of the difference of amplitudes.
        beta: weight of the difference of phases.

    Returns:
        A scalar.

    Raises:
        ShapeMismatch: the shapes differ, or are not ``(K, 2n)``.
        InvalidSetting: a weight is negative, or both are 0.
    """
    if synthetic.shape != real.shape:
        raise ShapeMismatch("synthetic means", tuple(synthetic.shape), f"{tuple(real.shape)} as the real")
    if real.dim() != 2 or real.shape[1] % 2:
        raise ShapeMismatch("means of characters", tuple(real.shape), "(K, 2n)")
    if min(alpha, beta) < 0 or alpha == beta == 0:
        raise InvalidSetting("alpha, beta", (alpha, beta), "two weights of at least 0, one of them above")
    r, s = (means.view(len(means), 2, -1) for means in (real, synthetic))
    if alpha == beta:
        apart = alpha**0.5 * torch.linalg.vector_norm(r - s, dim=1)  # its slope at 0 is 0, that of a square root is not
    else:
        amplitudes = torch.linalg.vector_norm(r, dim=1), torch.linalg.vector_norm(s, dim=1)
        louder = amplitudes[0] - amplitudes[1]
        if beta == 0:
            apart = alpha**0.5 * louder.abs()
        else:
            turned = 2 * (amplitudes[0] * amplitudes[1] - (r * s).sum(1)).clamp(min=_FLOOR / 2)
            apart = (alpha * louder.square() + beta * turned).sqrt()
    loss: Tensor = SCALE * apart.mean(1).sum()
    return loss
