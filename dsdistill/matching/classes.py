"""Who belongs to which class of a run."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsdistill.engine import Run, State


def class_positions(run: Run, state: State) -> Tensor:
    """Position in ``run.classes`` of every stored item, (N,) on the CPU."""
    position = torch.full((run.source.num_classes,), -1)
    position[list(run.classes)] = torch.arange(len(run.classes))
    return position[state.labels.classes]


def class_ranges(sizes: Tensor, limit: int) -> Iterator[slice]:
    """Consecutive classes whose decoded images, ``sizes`` (K,) of each class, are together about ``limit``."""
    ends = sizes.cumsum(0).tolist()
    begin, before = 0, 0
    for end in range(1, len(ends) + 1):
        if end == len(ends) or ends[end] - before > limit:
            yield slice(begin, end)
            begin, before = end, ends[end - 1]
