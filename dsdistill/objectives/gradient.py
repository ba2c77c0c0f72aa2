"""Distances between gradients of a network's weights on real and on synthetic images.

All are sums over the tensors given, and differentiable in the synthetic gradients. Zhao, Mopuri & Bilen (Dataset
Condensation, arXiv 2006.05929): `layerwise_cosine`, and as alternatives `squared_error` and `global_cosine`. Kim et al.
(IDC, arXiv 2205.14959): `squared_error` or `absolute_error`, on convolutions alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsdistill.errors import ShapeMismatch

GradientDistance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Real and synthetic gradients, tensor by tensor -> scalar."""

FLOOR = 1e-6
"""Added to the product of norms, as published. It is absolute: rows of norm below 0.001 count as unlike anything."""


def layerwise_cosine(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """DC's distance: one minus the cosine, for the weights of each output, summed over outputs and layers.

    A tensor of shape (outputs, ...) has one row for each output, with everything else flattened. Tensors of one
    dimension (biases, scales of batch, instance and group norm) do not count; those of a layer norm over (C, H, W) do,
    with one row for each channel.

    Args:
        real: gradients, of any shapes.
        synthetic: gradients of the same shapes.

    Returns:
        A scalar between 0 and twice the number of rows.

    Raises:
        ShapeMismatch: the shapes or numbers of tensors differ, or no tensor has two dimensions.
    """
    pairs = [(a.flatten(1), b.flatten(1)) for a, b in _paired(real, synthetic) if a.dim() > 1]
    if not pairs:
        raise ShapeMismatch("the gradients", tuple(real[0].shape), "at least one tensor of two dimensions or more")
    return torch.stack([_cosine_distance(a, b).sum() for a, b in pairs]).sum()


def global_cosine(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of all gradients as one vector; a scalar between 0 and 2.

    Raises:
        ShapeMismatch: the shapes or numbers of tensors differ, or there are none.
    """
    pairs = _paired(real, synthetic)
    return _cosine_distance(*(torch.cat([tensor.flatten() for tensor in side]) for side in zip(*pairs, strict=True)))


def squared_error(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Squared differences, summed over everything.

    Raises:
        ShapeMismatch: the shapes or numbers of tensors differ, or there are none.
    """
    return torch.stack([(a - b).square().sum() for a, b in _paired(real, synthetic)]).sum()


def absolute_error(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Absolute differences, summed over everything.

    Raises:
        ShapeMismatch: the shapes or numbers of tensors differ, or there are none.
    """
    return torch.stack([(a - b).abs().sum() for a, b in _paired(real, synthetic)]).sum()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine along the last axis, with the floor."""
    lengths: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return 1 - (a * b).sum(-1) / (lengths + FLOOR)


def _paired(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if not real or len(real) != len(synthetic):
        raise ShapeMismatch("synthetic gradients", (len(synthetic),), f"as many as the {len(real)} real, at least one")
    for a, b in zip(real, synthetic, strict=True):
        if a.shape != b.shape:
            raise ShapeMismatch("a synthetic gradient", tuple(b.shape), f"{tuple(a.shape)} as the real")
    return list(zip(real, synthetic, strict=True))
