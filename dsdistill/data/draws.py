"""Uniform draws of images from several classes at once, without replacement.

Usually every image of the classes gets a random key and the smallest keys win: one call for all classes, no waiting
for the device. Where that would take more than `MAX_KEYS` keys (huge classes, or one huge class among small ones),
classes of more than four times the draw are drawn in another way: random indices one after the other, repeated ones
dropped. The first j different values of such a sequence are a uniform ordered draw of j as well, and time and memory
grow with the draw, not with the class. Whether enough values differ has to be looked at: one wait for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_KEYS = 2**22
"""Number of keys, classes x largest class, up to which every image gets one."""

_HUGE = 4  # classes above this many times the draw are huge: half the indices drawn suffice with room to spare


class Plan(NamedTuple):
    """Constant tensors of a draw of up to ``width`` images from each of K classes.

    ``huge`` and ``small`` are None unless some classes are drawn by indices: then they are the places of those, and
    of the others, in the list of classes, and ``counts`` the sizes of the huge ones (H, 1).
    """

    starts: Tensor  # (K, 1) storage index of each class's first image
    absent: Tensor | None  # (keyed classes, largest of them): True beyond the end of a class; None when all are full
    kept: Tensor | None  # positions in the flattened (K, width) draw that are real; None when all are
    longest: int  # images of the largest class that is drawn by keys
    width: int
    huge: Tensor | None
    small: Tensor | None
    counts: Tensor | None


def make_plan(counts: Sequence[int], starts: Sequence[int], size: int, device: torch.device) -> Plan:
    """Prepare draws of ``size`` from classes of ``counts`` images that begin at ``starts``."""
    wanted = torch.tensor(counts)[:, None]
    width = min(size, max(counts))
    kept = (torch.arange(width) < wanted).flatten().nonzero().flatten()
    crowded = len(counts) * max(counts) > MAX_KEYS
    is_huge = (wanted[:, 0] > _HUGE * size) if crowded else torch.zeros(len(counts), dtype=torch.bool)
    keyed = wanted[~is_huge]
    longest = int(keyed.max()) if len(keyed) else 0
    absent = torch.arange(longest) >= keyed
    by_index = bool(is_huge.any())
    return Plan(
        starts=torch.tensor(starts, device=device)[:, None],
        absent=absent.to(device) if bool(absent.any()) else None,
        kept=kept.to(device) if len(kept) < width * len(counts) else None,
        longest=longest,
        width=width,
        huge=is_huge.nonzero().flatten().to(device) if by_index else None,
        small=(~is_huge).nonzero().flatten().to(device) if by_index else None,
        counts=wanted[is_huge].to(device) if by_index else None,
    )


def draw(plan: Plan, generator: torch.Generator) -> Tensor:
    """Storage indices (M,), class after class; ``generator`` and plan live on one device."""
    if plan.huge is None or plan.small is None or plan.counts is None:
        places = _by_keys(plan, len(plan.starts), plan.width, generator)
    else:
        places = torch.zeros(len(plan.starts), plan.width, dtype=torch.int64, device=plan.starts.device)
        if len(plan.small):
            few = _by_keys(plan, len(plan.small), min(plan.width, plan.longest), generator)
            places[plan.small, : few.shape[1]] = few
        places[plan.huge] = _by_indices(plan.counts, plan.width, generator)
    drawn = (places + plan.starts).flatten()
    return drawn if plan.kept is None else drawn.index_select(0, plan.kept)


def _by_keys(plan: Plan, classes: int, width: int, generator: torch.Generator) -> Tensor:
    """Places within each class (classes, width)."""
    # The smallest keys win. A tie cannot draw an image twice.
    keys = torch.rand(classes, plan.longest, generator=generator, device=plan.starts.device)
    if plan.absent is not None:
        keys.masked_fill_(plan.absent, 2.0)
    return keys.topk(width, dim=1, largest=False).indices


def _by_indices(counts: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """The first ``width`` different values of a random sequence below each of ``counts`` (H, 1): (H, width)."""
    values = torch.empty(len(counts), 0, dtype=torch.int64, device=counts.device)
    while True:
        # The remainder of 63 random bits is uniform to within counts / 2^63.
        more = torch.randint(2**63 - 1, (len(counts), 2 * width), generator=generator, device=counts.device) % counts
        values = torch.cat([values, more], dim=1)
        ordered, order = values.sort(dim=1, stable=True)
        repeated = torch.zeros_like(values, dtype=torch.bool)
        repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        first = (~repeated).cumsum(1)
        if int(first[:, -1].min()) >= width:
            # Repeated values go behind the others, which keep their order.
            return values.gather(1, repeated.to(torch.uint8).argsort(dim=1, stable=True)[:, :width])
