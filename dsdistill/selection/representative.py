"""A few clusters, each shown by the rows nearest to its centre: how AST begins (Shen et al., arXiv 2310.10541)."""

import torch
from torch import Tensor

from dsdistill.selection.k_means import k_means_centres
from dsdistill.selection.points import checked_count, nearest_in_turn

CLUSTERS = 10


def representative_indices(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The rows nearest to the centres of at most 10 clusters, (n, D) -> (count,), all different.

    The centres take turns, that of the largest cluster first, so each has count / 10 rows, rounded down, or one more
    if its cluster is among the largest. A row need not belong to the cluster whose centre it is nearest to among those
    left. Up to 10 rows are those of `k_means_indices`. (The authors' code drops the remainder of count / 10, which
    leaves nothing below 10, and may take a row twice.)

    Args:
        generator: on the CPU; one draw from it seeds the clustering.

    Raises:
        ShapeMismatch, BadData, InvalidSetting: the features do not do, or are fewer than ``count``.
    """
    checked_count(features, count)
    return nearest_in_turn(features, k_means_centres(features, min(count, CLUSTERS), generator), count)
