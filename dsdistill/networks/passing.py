"""Passing many images through a network in parts, where it may matter which images share one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsdistill.core.device import in_parts


def takes_batch_statistics(network: nn.Module) -> bool:
    """Whether batch normalisation, in the mode it is in, makes the result of an image depend on its batch."""
    parts = (part for part in network.modules() if isinstance(part, _BatchNorm))
    return any(part.training or part.running_mean is None for part in parts)


@torch.no_grad()
def pass_rows(
    function: Callable[[Tensor], Tensor],
    count: int,
    chunk: int,
    device: torch.device,
    mixed: torch.Generator | None = None,
) -> Tensor:
    """What ``function`` makes of each of ``count`` rows, (count, ...), in their order and without gradients.

    Images are stored class after class, so parts in that order hold one class or few. Their statistics are not those
    of the images a network was trained on: one that `takes_batch_statistics` must see parts of mixed rows.

    Args:
        function: int64 row numbers (m,) on ``device`` -> one result for each, (m, ...).
        count: number of rows, at least 1.
        chunk: rows that pass at a time.
        device: of the row numbers.
        mixed: on the CPU; the rows pass in an order drawn from it, in parts of nearly equal size. None: in their own.
    """
    if mixed is None:
        return torch.cat([function(part) for part in torch.split(torch.arange(count, device=device), chunk)])
    order = torch.randperm(count, generator=mixed)
    found = torch.cat([function(part.to(device)) for part in in_parts(order, chunk)])
    return found[torch.argsort(order).to(found.device)]
