"""The greedy rule for k centres (Gonzalez 1985; for choosing images: Sener & Savarese, arXiv 1708.00489).

Each choice is the row farthest from its nearest chosen one::

    i_{k+1} = argmax_i min_{j <= k} ‖ φ_i − φ_{i_j} ‖

so that every row ends up within twice the least radius with which ``count`` balls can cover all.
"""

from typing import Literal

import torch
from torch import Tensor

from dsdistill.errors import InvalidSetting
from dsdistill.selection.points import checked_count, distances

First = Literal["mean", "random"]


def k_center_indices(
    features: Tensor, count: int, generator: torch.Generator | None = None, *, first: First | int = "mean"
) -> Tensor:
    """Rows that cover all others, (n, D) -> (count,), in order of choice; of equally good rows the first.

    Only the distance of each row to its nearest chosen one is kept, (n,).

    Args:
        generator: on the CPU; draws the first row where ``first`` is "random".
        first: the row to begin with: nearest to the mean, at random, or this one.

    Raises:
        ShapeMismatch, BadData, InvalidSetting: the features do not do, or are fewer than ``count``.

    Example:
        >>> k_center_indices(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 3, first=0).tolist()
        [0, 3, 2]
    """
    checked_count(features, count)
    picked = _first(features, first, generator)
    chosen = [picked]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    for _ in range(count - 1):
        torch.minimum(nearest, distances(features, features.index_select(0, picked)), out=nearest)
        nearest.index_fill_(0, picked, -1.0)  # below any distance: copies of a chosen row are at 0
        picked = nearest.argmax()[None]
        chosen.append(picked)
    return torch.cat(chosen)


def _first(features: Tensor, first: First | int, generator: torch.Generator | None) -> Tensor:
    if first == "mean":
        return distances(features, features.mean(0, keepdim=True)).argmin()[None]
    if first == "random":
        if generator is None:
            raise InvalidSetting("generator", generator, "a torch.Generator, for the first row is drawn from it")
        return torch.randint(len(features), (1,), generator=generator).to(features.device)
    if isinstance(first, int) and 0 <= first < len(features):
        return torch.tensor([first], device=features.device)
    raise InvalidSetting("first", first, f"'mean', 'random', or a row from 0 to {len(features) - 1}")
