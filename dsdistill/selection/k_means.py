"""Cluster centres (Lloyd 1982, started by k-means++: Arthur & Vassilvitskii 2007), each as the row nearest to it."""

import warnings
from typing import Any

import torch
from torch import Tensor

from dsdistill.selection.points import checked_count, nearest_in_turn


def k_means_indices(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """For each of ``count`` clusters the row nearest to its centre, (n, D) -> (count,), all different.

    The largest cluster comes first. A row that is nearest to two centres is given to the first of them; the other
    takes the next nearest. The clustering is scikit-learn's and runs on the CPU.

    Args:
        generator: on the CPU; one draw from it seeds the clustering.

    Raises:
        ShapeMismatch, BadData, InvalidSetting: the features do not do, or are fewer than ``count``.
    """
    checked_count(features, count)
    return nearest_in_turn(features, k_means_centres(features, count, generator), count)


def k_means_centres(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres (count, D) of as many clusters of the rows (n, D), that of the largest cluster first.

    Args:
        generator: on the CPU; one draw from it seeds the clustering.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    rows: Any = features.detach().cpu().numpy()
    # Several threads, those of BLAS included, add in an order of their own, which changes the last bits.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer different rows than clusters: the centres that are left over take their next nearest rows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(count, n_init=1, random_state=seed).fit(rows)
    sizes = torch.from_numpy(found.labels_).to(torch.int64).bincount(minlength=count)
    return torch.from_numpy(found.cluster_centers_)[sizes.argsort(descending=True, stable=True)].to(features)
