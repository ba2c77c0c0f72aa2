"""Universal feature compensators (Zhang et al., Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class
Feature Compensator, arXiv 2408.06927).

A stored item is a real image x, its anchor. Anchors form groups, one of each class say, and a group shares M
compensators u_1 .. u_M of the size of an image. An item decodes to M + 1 images::

    x,    clip(x + u_1),    ...,    clip(x + u_M)

where `clip` keeps a pixel between given bounds. What is stored is anchors, compensators, and the group of each anchor:
for C classes, and a group of one anchor of each, C + M images for C (M + 1) that networks are trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch
from dsdistill.parameterizations.base import Decoded, Parameterization

_NAMES = ("anchors", "compensators", "groups")


class Compensated(Parameterization):
    """Fixed anchors (N, C, H, W) and learned compensators (G, M, C, H, W), float32, standardised.

    `decode` gives M + 1 blocks: all anchors, all anchors with their first compensator, and so on.

    Args:
        anchors: (N, C, H, W).
        compensators: (G, M, C, H, W).
        groups: (N,) integers from 0 to G - 1, whose compensators an anchor gets.
        low: the least value of each channel that an anchor with its compensator may have.
        high: the largest one.

    Raises:
        ShapeMismatch: shapes do not fit together.
        BadData: a group is out of range, or a bound is no number or above the other.
    """

    key = "compensated"

    def __init__(
        self, anchors: Tensor, compensators: Tensor, groups: Tensor, low: Sequence[float], high: Sequence[float]
    ) -> None:
        super().__init__()
        if anchors.dim() != 4:
            raise ShapeMismatch("the anchors", tuple(anchors.shape), "(N, C, H, W)")
        if compensators.dim() != 5 or compensators.shape[2:] != anchors.shape[1:]:
            raise ShapeMismatch("the compensators", tuple(compensators.shape), f"(G, M, {anchors.shape[1:]})")
        if groups.shape != anchors.shape[:1] or groups.is_floating_point():
            raise ShapeMismatch("groups", tuple(groups.shape), f"({len(anchors)},) integers, one per anchor")
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(compensators):
            raise BadData(
                f"groups span [{int(groups.min())}, {int(groups.max())}], and there are {len(compensators)} of them"
            )
        self.low, self.high = tuple(map(float, low)), tuple(map(float, high))
        if not len(self.low) == len(self.high) == anchors.shape[1] or not all(map(_ascending, self.low, self.high)):
            raise BadData(
                f"bounds {self.low} and {self.high}: two numbers, ascending, for each of {anchors.shape[1]} channels"
            )
        self.compensators = nn.Parameter(compensators.detach().clone(memory_format=torch.contiguous_format))
        self.anchors: Tensor
        # Never changed, so no part of what a checkpoint keeps.
        held = anchors.detach().clone(memory_format=torch.contiguous_format)
        self.register_buffer("anchors", held, persistent=False)
        self.groups = groups.detach().to("cpu", torch.int64, copy=True)
        each = len(anchors) // max(1, len(compensators))
        self._even = torch.equal(self.groups, torch.arange(len(compensators)).repeat_interleave(each))

    @property
    def count(self) -> int:
        return len(self.anchors)

    @property
    def each(self) -> int:
        """M, compensators of a group."""
        return self.compensators.shape[1]

    @property
    def multiplicity(self) -> Tensor:
        return torch.full((self.count,), self.blocks, dtype=torch.int64)

    @property
    def blocks(self) -> int:
        return 1 + self.each

    def decode(self, index: Tensor | None = None) -> Decoded:
        owner = torch.arange(self.count) if index is None else index
        anchors = self.anchors
        if index is not None:
            anchors = anchors.index_select(0, index.to(anchors.device, non_blocking=True))
        low, high = (_bound(values, anchors) for values in (self.low, self.high))
        images = [anchors]
        for place in range(self.each):
            added = self._added(place, index)
            total = anchors + added
            # Unlike `torch.clamp` with tensors this passes the whole gradient on at a bound, where black pixels are.
            images.append(torch.where(total < low, low, torch.where(total > high, high, total)))
        return Decoded(torch.cat(images), owner.repeat(self.blocks))

    def _added(self, place: int, index: Tensor | None) -> Tensor:
        """One compensator for each anchor at ``index``, (n, C, H, W)."""
        chosen = self.compensators[:, place]
        if index is None and self._even and self.count:
            # A view whose gradient is a sum in a fixed order on every device.
            each = self.count // len(chosen)
            return chosen.unsqueeze(1).expand(-1, each, -1, -1, -1).flatten(0, 1)
        groups = self.groups if index is None else self.groups[index]
        return chosen.index_select(0, groups.to(chosen.device, non_blocking=True))

    @torch.no_grad()
    def imitate(self, images: Tensor) -> None:
        """Anchors become the first block, compensators the mean of what the other blocks have beyond it."""
        expected = (self.count * self.blocks, *self.anchors.shape[1:])
        if tuple(images.shape) != expected:
            raise ShapeMismatch("the images to imitate", tuple(images.shape), str(expected))
        first, *others = images.to(self.anchors.device).chunk(self.blocks)
        self.anchors.copy_(first)
        groups = self.groups.to(first.device)
        sizes = torch.bincount(groups, minlength=len(self.compensators)).clamp_min(1).view(-1, 1, 1, 1)
        for place, block in enumerate(others):
            total = torch.zeros_like(self.compensators[:, place]).index_add_(0, groups, block - first)
            self.compensators[:, place] = total / sizes

    @torch.no_grad()
    def fill_noise(self, generator: torch.Generator) -> None:
        super().fill_noise(generator)
        self.anchors.copy_(torch.randn(self.anchors.shape, generator=generator, device=generator.device))

    def tensors(self) -> dict[str, Tensor]:
        stored = (self.anchors, self.compensators.detach(), self.groups.to(torch.int32))
        return dict(zip(_NAMES, stored, strict=True))

    def settings(self) -> dict[str, Any]:
        return {"low": list(self.low), "high": list(self.high)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        if set(tensors) != set(_NAMES):
            raise BadData(f"this form needs the tensors {', '.join(_NAMES)}, got {sorted(tensors)}")
        anchors, compensators, groups = (tensors[name] for name in _NAMES)
        if not (anchors.is_floating_point() and compensators.is_floating_point()):
            raise BadData(f"anchors and compensators are floats, got {anchors.dtype} and {compensators.dtype}")
        anchors, compensators = anchors.float(), compensators.float()
        if not bool(torch.isfinite(anchors).all() and torch.isfinite(compensators).all()):
            raise BadData("anchors or compensators do not fit float32: NaN or infinity")
        for name in ("low", "high"):
            if not isinstance(settings.get(name), list):
                raise InvalidSetting(name, settings.get(name), "a list of numbers, one for each channel")
        return cls(anchors, compensators, groups, settings["low"], settings["high"])

    def subset(self, index: Tensor) -> Self:
        """The anchors at ``index``, with the groups that they need; these keep their order."""
        kept, groups = torch.unique(self.groups[index.cpu()], return_inverse=True)
        anchors = self.anchors.index_select(0, index.to(self.anchors.device))
        compensators = self.compensators.detach().index_select(0, kept.to(self.anchors.device))
        return type(self)(anchors, compensators, groups, self.low, self.high)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Anchors of all parts, each with the groups of its own part.

        Raises:
            BadData: numbers of compensators or bounds differ.
        """
        first = parts[0]
        if any((part.each, part.settings()) != (first.each, first.settings()) for part in parts):
            raise BadData("cannot join sets whose numbers of compensators, or bounds of pixels, differ")
        begins = torch.tensor([0, *(len(part.compensators) for part in parts[:-1])]).cumsum(0).tolist()
        return cls(
            torch.cat([part.anchors for part in parts]),
            torch.cat([part.compensators for part in parts]),
            torch.cat([part.groups + begin for part, begin in zip(parts, begins, strict=True)]),
            first.low,
            first.high,
        )


def _ascending(low: float, high: float) -> bool:
    return -float("inf") < low <= high < float("inf")


def _bound(values: Sequence[float], images: Tensor) -> Tensor:
    """(C, 1, 1) beside images."""
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
