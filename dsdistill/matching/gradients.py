"""Matching the gradients that real and synthetic images of a class give a network's weights::

    L = Σ_c D( ∇_θ mean_{x ∈ T_c} ℓ(A_c(x), c),  ∇_θ mean_{s ∈ S_c} ℓ(A_c(s), c) ),   ℓ the cross-entropy

What a method brings is θ, which of its weights count, and D.

One class passes after the other, so memory holds the graph of one; in chunks, whose gradients add up to the class's.
That asks that images do not couple: normalise by instance, group or layer, or let `settle_batchnorm` fix the
statistics. The network itself is not touched: its weights are lent to a functional call, and nothing is computed for
its other parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from dsdistill.core.device import in_parts
from dsdistill.engine import Run, State
from dsdistill.errors import InvalidSetting
from dsdistill.matching.classes import class_positions
from dsdistill.matching.views import ClassViews
from dsdistill.networks import has_batchnorm
from dsdistill.objectives import GradientDistance

Weights = dict[str, Tensor]
"""Weights that gradients are taken of, by their names in the network."""


def matched_weights(network: nn.Module, least: int = 2) -> Weights:
    """The parameters with ``least`` dimensions or more: 2 for all weights, 4 for those of 2-D convolutions.

    Those of one dimension are left out either way: biases, scales and shifts of batch, instance and group norm. A layer
    norm over (C, H, W) has three, so with 2 its scales and shifts count, as they do for DC's authors.
    """
    return {
        name: parameter.detach().requires_grad_()
        for name, parameter in network.named_parameters()
        if parameter.dim() >= least
    }


def gradient_chunk(run: Run) -> int:
    """How many images should pass at a time where gradients are taken, which hold several activations of each."""
    return max(1, run.chunk // 2)


def match_gradients(
    run: Run,
    state: State,
    iteration: int,
    *,
    network: nn.Module,
    weights: Weights,
    distance: GradientDistance,
    real_batch: int,
    views: ClassViews,
    synthetic_batch: int | None = None,
) -> Tensor:
    """The loss, detached; its gradient is added to that of the stored images, and of labels that are learned.

    Args:
        iteration: its real images are drawn from the stream "real".
        network: without gradients of its own; see `dsdistill.engine.frozen`.
        weights: see `matched_weights`.
        distance: D, a sum over tensors; differentiable in the second argument.
        real_batch: real images per class, without replacement; a smaller class gives all it has.
        views: shared by the real and synthetic images of a class.
        synthetic_batch: most decoded images per class, drawn from the stream "synthetic"; None for all. Images that
            belong together (see `Parameterization.blocks`) are drawn together, one such group at least.
    """
    source, classes = run.source, run.classes
    sides = _Sides(run, state, network, weights, distance, views)
    index = source.per_class_indices(classes, real_batch, run.rng.at("real", iteration))
    real = torch.split(index, source.sizes_per_class(classes, real_batch))
    owner = class_positions(run, state)
    draws = run.rng.at("synthetic", iteration, device="cpu")
    loss = torch.zeros((), device=run.device)
    for position, rows in enumerate(real):
        images, items = state.images.decode((owner == position).nonzero().flatten())
        if synthetic_batch is not None and len(items) > synthetic_batch:
            kept = _subset(len(items), synthetic_batch, state.images.blocks, draws)
            images, items = images.index_select(0, kept.to(images.device, non_blocking=True)), items[kept]
        images = views.show(images, torch.full((len(items),), position))
        loss = loss + sides.match(sides.real(position, rows), images, state.labels.target(items))
    return loss


def _subset(count: int, most: int, blocks: int, generator: torch.Generator) -> Tensor:
    """Places of at most ``most`` out of ``count`` images, the same ones of every block."""
    size = count // blocks
    places = torch.randperm(size, generator=generator)[: max(1, most // blocks)]
    return (size * torch.arange(blocks)[:, None] + places).flatten()


def refuse_unsettled(setting: str, name: str, network: nn.Module) -> None:
    """Refuse batch normalisation without running statistics, which nothing can fix: it couples images in any mode.

    Args:
        setting: which setting chose the network, e.g. "DC.network".
        name: what it chose.

    Raises:
        InvalidSetting: naming both, and the mend.
    """
    if any(isinstance(part, _BatchNorm) and part.running_mean is None for part in network.modules()):
        allowed = "its batch normalisation keeps no running statistics to match by: set track_running_stats=True"
        raise InvalidSetting(setting, name, allowed)


@torch.no_grad()
def settle_batchnorm(run: Run, network: nn.Module, iteration: int, *, real_batch: int = 16) -> None:
    """Fix what batch normalisation normalises by, after which images no longer couple. Does nothing without it.

    The running statistics take in ``real_batch`` real images of each class, drawn from the stream "batchnorm"; then
    these layers, and no others, go to evaluation mode. Synthetic batches are too small for statistics of their own.
    They move by the layer's momentum, so those of a fresh network are, at the usual 0.1, nine tenths of where they
    begin (mean 0, variance 1) and one tenth of the batch's.
    """
    if not has_batchnorm(network):
        return
    index = run.source.per_class_indices(run.classes, real_batch, run.rng.at("batchnorm", iteration))
    network(run.source.gather(index))
    for part in network.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


@dataclass(frozen=True)
class _Sides:
    """The real and the synthetic gradients of a step."""

    run: Run
    state: State
    network: nn.Module
    weights: Weights
    distance: GradientDistance
    views: ClassViews

    def real(self, position: int, rows: Tensor) -> list[Tensor]:
        """Gradients of one class's real images at storage indices ``rows``."""
        source = self.run.source
        parts = [
            self._gradients(
                self.views.show(source.gather(part), torch.full((len(part),), position)),
                source.targets[part],
                len(rows),
            )
            for part in in_parts(rows, gradient_chunk(self.run))
        ]
        return _added(parts)

    def match(self, target: list[Tensor], images: Tensor, wanted: Tensor) -> Tensor:
        """The distance of one class, whose gradient goes to what ``images`` and labels ``wanted`` are made of."""
        learned = [*self.state.images.parameters(), *self.state.labels.parameters()]
        if len(images) <= self.run.chunk:  # as one, which saves a pass
            value = self.distance(target, self._gradients(images, wanted, len(images), twice=True))
            torch.autograd.backward(value, inputs=learned)
        else:
            leaf, labels = images.detach().requires_grad_(), wanted.detach().requires_grad_(wanted.requires_grad)
            value = self._split(target, leaf, labels)
            made = [(images, leaf.grad), *([(wanted, labels.grad)] if wanted.requires_grad else [])]
            torch.autograd.backward([tensor for tensor, _ in made], [slope for _, slope in made], inputs=learned)
        return value.detach()

    def _split(self, target: list[Tensor], images: Tensor, wanted: Tensor) -> Tensor:
        """The distance of a class too large to pass at once, and its slope at leaves, at the cost of one more pass.

        The class's gradient g is the sum of its chunks' gradients. Once it is known, so is u = dD/dg, and what a chunk
        adds to the slope of D is that of ⟨u, its gradient⟩.
        """
        count, chunk = len(images), gradient_chunk(self.run)
        chunks = list(zip(in_parts(images, chunk), in_parts(wanted, chunk), strict=True))
        found = _added([self._gradients(part.detach(), labels.detach(), count) for part, labels in chunks])
        value = self.distance(target, [gradient.requires_grad_() for gradient in found])
        slopes = torch.autograd.grad(value, found)
        leaves = [leaf for leaf in (images, wanted) if leaf.requires_grad]
        for part, labels in chunks:
            pieces = self._gradients(part, labels, count, twice=True)
            product = torch.stack([(u * g).sum() for u, g in zip(slopes, pieces, strict=True)]).sum()
            torch.autograd.backward(product, inputs=leaves)
        return value

    def _gradients(self, images: Tensor, wanted: Tensor, count: int, *, twice: bool = False) -> list[Tensor]:
        """Gradients of the summed cross-entropy divided by ``count``; ``twice``: to be differentiated again."""
        logits = functional_call(self.network, self.weights, (images,))
        loss = cross_entropy(logits, wanted, reduction="sum") / count
        # A weight that has no part in the logits has gradient zero, on both sides.
        return list(
            torch.autograd.grad(
                loss, list(self.weights.values()), create_graph=twice, allow_unused=True, materialize_grads=True
            )
        )


def _added(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Sums, tensor by tensor."""
    total = parts[0]
    for part in parts[1:]:
        total = [a + b for a, b in zip(total, part, strict=True)]
    return total
