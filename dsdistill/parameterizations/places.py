"""Where the decoded images of a stored item stand among those of all items."""

from collections.abc import Callable

import torch
from torch import Tensor


def places_of(owner: Tensor, multiplicity: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function of items, int64 (R,) on any device: the places of all their images, item after item, on ``device``.

    It does not wait for the device unless items decode to different numbers of images.

    Args:
        owner: (M,) the item of each decoded image, as `Parameterization.decode` gives it.
        multiplicity: (N,) how many images each item decodes to.
    """
    # Images sorted by their item: those of item i begin at starts[i].
    order = torch.argsort(owner, stable=True).to(device)
    if bool((multiplicity == multiplicity[0]).all()):
        table = order.view(-1, int(multiplicity[0]))
        return lambda rows: table.index_select(0, rows.to(device, non_blocking=True)).flatten()
    starts = multiplicity.cumsum(0) - multiplicity
    ranges = [order[start : start + count] for start, count in zip(starts.tolist(), multiplicity.tolist(), strict=True)]
    return lambda rows: torch.cat([ranges[item] for item in rows.tolist()])
