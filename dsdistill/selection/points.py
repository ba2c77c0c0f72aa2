"""What the rules share: distances to one point at a time, the rows nearest to several, what may be asked of them."""

import torch
from torch import Tensor

from dsdistill.core.config import whole_number
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch


def checked_count(features: Tensor, count: int) -> int:
    """How many to choose, after a look at what they are chosen from.

    Raises:
        ShapeMismatch: the features are no matrix (n, D) with n >= 1.
        BadData: a feature is NaN or infinite.
        InvalidSetting: ``count`` is not 1 to n.
    """
    if features.dim() != 2 or not len(features):
        raise ShapeMismatch("the features", tuple(features.shape), "(n, D), one row for each of at least one image")
    if whole_number("count", count, 1) > len(features):
        raise InvalidSetting("count", count, f"at most {len(features)}: each image is chosen once")
    if not bool(torch.isfinite(features).all()):
        raise BadData(
            "features are NaN or infinite: the network that gives them diverged while it was trained; "
            "lower the step size of its training"
        )
    return count


def distances(features: Tensor, point: Tensor) -> Tensor:
    """Euclidean distances (n,) of the rows of (n, D) to a point (1, D); an equal row has distance 0 exactly."""
    # Differences are squared: |x|^2 - 2 xy + |y|^2 in one matrix product would lose the digits that tell neighbours.
    return torch.cdist(features, point, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


def nearest_in_turn(features: Tensor, points: Tensor, count: int) -> Tensor:
    """Rows (count,) of (n, D), all different: the points (P, D) take turns, each its nearest row that is left."""
    apart = torch.stack([distances(features, point[None]) for point in points])
    chosen = []
    for turn in range(count):
        picked = apart[turn % len(points)].argmin()[None]
        apart.index_fill_(1, picked, torch.inf)
        chosen.append(picked)
    return torch.cat(chosen)
