"""Matching class means of any per-image signal ψ, with memory for one chunk of images::

    L = d(r, s),   r_c = mean_{x in T_c} ψ(A_c(x)),   s_c = mean_{s in S_c} ψ(A_c(s)),   d a sum over classes

What a method brings is ψ (features for DM, attention maps for DataDAM, characters for NCFM) and d.

All classes pass together, in chunks: equal, up to the order of summation, to one class after the other, because
instance, group and layer normalisation do not couple images. Of the real side only sums are kept. Where the signal
couples images (batch normalisation), each side passes whole, as one domain of statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsdistill.core.device import in_parts
from dsdistill.engine import Run, State
from dsdistill.matching.classes import class_positions, class_ranges
from dsdistill.matching.views import ClassViews
from dsdistill.objectives import class_sums

Signal = Callable[[Tensor], Tensor]
"""Standardised images (M, C, H, W) -> (M, D), one row per image."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""Real and synthetic means, (K, D) each -> scalar, a sum over the K classes."""

_UNSPLIT = 4  # on a CPU, whose chunks are small, a class of up to so many passes as one, which saves a forward pass


def match_means(
    run: Run,
    state: State,
    iteration: int,
    *,
    signal: Signal,
    distance: Distance,
    real_batch: int,
    views: ClassViews,
    couples: bool,
    unsplit: int | None = None,
) -> Tensor:
    """The loss, detached; its gradient is added to that of the stored images.

    Args:
        iteration: its real images are drawn from the stream "real".
        signal: ψ; what it does is not differentiated for real images.
        distance: d, differentiable in the second argument.
        real_batch: real images per class, without replacement; a smaller class gives all it has.
        views: shared by the real and synthetic images of a class.
        couples: the signal of an image depends on the others that pass with it, so each side passes whole.
        unsplit: chunks up to which a class passes as one; None for what is fast on the device.
    """
    sides = _Sides(run, state, signal, views, class_positions(run, state))
    target = sides.real_means(iteration, real_batch, couples)
    sizes = sides.sizes()
    if unsplit is None:
        unsplit = _UNSPLIT if run.device.type == "cpu" else 1
    loss = torch.zeros((), device=run.device)
    for part in class_ranges(sizes, int(sizes.sum()) if couples else run.chunk):
        # The loss is a sum over classes, so its gradient may be taken range by range.
        if couples or int(sizes[part].sum()) <= unsplit * run.chunk:
            value = distance(target[part], sides.synthetic_means(part))
            value.backward()  # type: ignore[no-untyped-call]
        else:
            value = sides.split_class(part, target[part], distance)
        loss = loss + value.detach()
    return loss


@dataclass(frozen=True)
class _Sides:
    """The real and the synthetic images of a step; ``owner`` is the class position of every stored item."""

    run: Run
    state: State
    signal: Signal
    views: ClassViews
    owner: Tensor

    def sizes(self) -> Tensor:
        """(K,) decoded synthetic images of each class."""
        multiplicity = self.state.images.multiplicity
        return multiplicity.new_zeros(len(self.run.classes)).index_add(0, self.owner, multiplicity)

    @torch.no_grad()
    def real_means(self, iteration: int, real_batch: int, couples: bool) -> Tensor:
        """(K, D) means of fresh real images; only sums are kept, so memory does not grow with the batch."""
        source, classes = self.run.source, self.run.classes
        index = source.per_class_indices(classes, real_batch, self.run.rng.at("real", iteration))
        sizes = torch.tensor(source.sizes_per_class(classes, real_batch))
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        chunk = len(owner) if couples else self.run.chunk
        sums = torch.zeros((), device=self.run.device)
        for rows, whose in zip(in_parts(index, chunk), in_parts(owner, chunk), strict=True):
            sums = sums + self._sums(source.gather(rows), whose, slice(0, len(sizes)))
        return sums / sizes.to(sums, non_blocking=True)[:, None]

    def synthetic_means(self, part: slice) -> Tensor:
        """(K', D) means of the synthetic images of a range of classes, differentiable in what is stored."""
        items = ((self.owner >= part.start) & (self.owner < part.stop)).nonzero().flatten()
        images, stored = self.state.images.decode(items)
        counts = self.owner[stored].bincount(minlength=part.stop)[part]
        sums = self._sums(images, self.owner[stored], part)
        return sums / counts.to(sums, non_blocking=True)[:, None]

    def split_class(self, part: slice, target: Tensor, distance: Distance) -> Tensor:
        """The loss of one class too large to pass at once, and its gradient, at the cost of a second forward pass.

        With m = s / n the mean of n signals, the gradient of d in s is d'(m) / n: once it is known, every chunk of
        images can be differentiated on its own.
        """
        items, multiplicity = (self.owner == part.start).nonzero().flatten(), self.state.images.multiplicity
        count = int(multiplicity[items].sum())
        groups = torch.split(items, max(1, self.run.chunk // int(multiplicity[items].max())))

        def sums(group: Tensor) -> Tensor:
            images, stored = self.state.images.decode(group)
            return self._sums(images, self.owner[stored], part)

        with torch.no_grad():
            mean = torch.stack([sums(group) for group in groups]).sum(0) / count
        value = distance(target, mean.requires_grad_())
        (slope,) = torch.autograd.grad(value, mean)
        for group in groups:
            (sums(group) * (slope / count)).sum().backward()  # type: ignore[no-untyped-call]
        return value

    def _sums(self, images: Tensor, owner: Tensor, part: slice) -> Tensor:
        """(K', D) sums of the signals of each class in ``part``; ``owner`` (M,) is the class position of an image."""
        images = self.views.show(images, owner)
        rows = (owner - part.start).to(images.device, non_blocking=True)
        return class_sums(self.signal(images), rows, part.stop - part.start)
