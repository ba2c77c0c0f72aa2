"""Matching characteristic functions of features, at frequencies that may be learned (Wang et al., arXiv 2502.20653).

Their values are class means of `characters`, which `match_means` matches. Here is what frequencies ask for besides:
they meet more images at a time than pass a network, and the slope of the loss in them costs no second look at any.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsdistill.core.device import default_chunk
from dsdistill.engine import Run, State
from dsdistill.matching.means import match_means
from dsdistill.matching.views import ClassViews
from dsdistill.networks import embed, has_batchnorm
from dsdistill.objectives import characteristic_distance, characters

_ROWS, _CHUNKS = 256, 16  # images, and chunks, at most that meet the frequencies at a time


def match_characters(
    run: Run,
    state: State,
    iteration: int,
    *,
    network: nn.Module,
    frequencies: Tensor,
    weights: tuple[float, float],
    real_batch: int,
    views: ClassViews,
) -> tuple[Tensor, Tensor | None]:
    """The loss, detached, and its slope in the frequencies; its gradient is added to that of the stored images.

    Args:
        iteration: its real images are drawn from the stream "real".
        network: whose features, scaled to length 1, are looked at.
        frequencies: (n, D); where they require a gradient they get their slope, (n, D), else None.
        weights: α and β of `characteristic_distance`.
        real_batch: real images per class, without replacement; a smaller class gives all it has.
        views: shared by the real and synthetic images of a class.
    """
    learned, couples = frequencies.requires_grad, has_batchnorm(network)
    sizes = run.source.sizes_per_class(run.classes, real_batch)
    leaf = frequencies.detach().requires_grad_(learned)
    look = _Look(network, leaf, weights, sizes, None if couples else run.chunk)
    loss = match_means(
        replace(run, chunk=_together(run)),
        state,
        iteration,
        signal=look.signal,
        distance=look.distance,
        real_batch=real_batch,
        views=views,
        couples=couples,
        unsplit=1,
    )
    return loss, look.slope() if learned else None


def _together(run: Run) -> int:
    """Images that meet the frequencies at a time, as many as a graph holds: a chunk, or several where that is faster.

    That is on a CPU, whose chunks are small. Where somebody wants less memory than usual, or it ran out, a chunk is a
    chunk, so that a smaller one helps.
    """
    usual = default_chunk(run.source.shape, run.device)
    if run.device.type != "cpu" or run.chunk < max(2, usual):
        return run.chunk
    return max(run.chunk, min(_ROWS, _CHUNKS * usual))


@dataclass
class _Look:
    """Signal and distance of a step for `match_means`, and the slope of its loss in the frequencies, if they want one.

    `match_means` shows the real images first, class after class, and differentiates nothing of them. Their features are
    kept, so that what the loss says of the frequencies through them costs no second look.
    """

    network: nn.Module
    frequencies: Tensor
    weights: tuple[float, float]
    sizes: list[int]
    """Numbers of real images of each class."""
    chunk: int | None
    """Images that pass the network at a time; None for all, where it couples them."""
    _real: list[Tensor] = field(default_factory=list)
    _slopes: list[Tensor] = field(default_factory=list)

    def signal(self, images: Tensor) -> Tensor:
        """Images (M, C, H, W) -> (M, 2n)."""
        parts = torch.split(images, self.chunk or len(images))
        features = F.normalize(torch.cat([embed(self.network, part) for part in parts]))
        if self.frequencies.requires_grad and sum(map(len, self._real)) < sum(self.sizes):
            self._real.append(features)
        return characters(features, self.frequencies)

    def distance(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Means (K, 2n) of consecutive classes -> scalar."""
        if self.frequencies.requires_grad:
            leaf = real.detach().requires_grad_()
            value = characteristic_distance(leaf, synthetic.detach(), *self.weights)
            self._slopes += torch.autograd.grad(value, leaf)
        return characteristic_distance(real, synthetic, *self.weights)

    def slope(self) -> Tensor:
        """(n, D), once the loss has been differentiated in the images."""
        counts, slopes = torch.tensor(self.sizes), torch.cat(self._slopes)
        slopes = slopes / counts.to(slopes)[:, None]
        owners = torch.split(torch.arange(len(counts)).repeat_interleave(counts), [len(part) for part in self._real])
        for features, owner in zip(self._real, owners, strict=True):
            seen = characters(features, self.frequencies) * slopes[owner.to(slopes.device, non_blocking=True)]
            seen.sum().backward()  # type: ignore[no-untyped-call]
        assert self.frequencies.grad is not None
        return self.frequencies.grad
