"""Herding (Welling, Herding Dynamical Weights to Learn, ICML 2009; Rebuffi et al., iCaRL, arXiv 1611.07725).

The k-th choice, k = 1, 2, ..., brings the sum of all k chosen features nearest to k times the mean::

    i_k = argmin_i ‖ (k μ − Σ_{j < k} φ_{i_j}) − φ_i ‖,   i not chosen yet

which is iCaRL's rule, argmin ‖ μ − (φ_i + Σ_{j < k} φ_{i_j}) / k ‖, times k; k counts the image about to be chosen.
"""

import torch
from torch import Tensor

from dsdistill.selection.points import checked_count, distances


def herding_indices(features: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows whose mean follows the mean of all as they become more, (n, D) -> (count,), in order of choice.

    Nothing is drawn. Of equally good rows the first is chosen.

    Raises:
        ShapeMismatch, BadData, InvalidSetting: the features do not do, or are fewer than ``count``.

    Example:
        >>> herding_indices(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 3).tolist()
        [2, 1, 3]
    """
    checked_count(features, count)
    mean = features.mean(0, keepdim=True)
    missing = mean.clone()  # k times the mean, minus the sum of what was chosen
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for _ in range(count):
        picked = distances(features, missing).masked_fill(taken, torch.inf).argmin()[None]
        missing += mean - features.index_select(0, picked)
        taken.index_fill_(0, picked, True)
        chosen.append(picked)
    return torch.cat(chosen)
