"""Distribution matching: distances between class means of features (Zhao & Bilen, arXiv 2110.04181)."""

import torch
from torch import Tensor

from dsdistill.errors import ShapeMismatch


def class_sums(features: Tensor, owner: Tensor, classes: int) -> Tensor:
    """Sum of the features of each class, ``(M, D) -> (classes, D)``.

    A product with a one-hot matrix, so the result and its gradient are deterministic on every device. Sums of
    successive chunks add up to the sum of the whole. Half precision is summed in float32, autocast or not.

    Args:
        features: ``(M, D)``.
        owner: ``(M,)`` int64 on the device of the features, the class of each row in ``0 .. classes - 1``.
        classes: number of classes K; one without rows gets zeros.

    Raises:
        ShapeMismatch: the features are not ``(M, D)``, or ``owner`` is not ``(M,)``.
    """
    if features.dim() != 2:
        raise ShapeMismatch("features", tuple(features.shape), "(M, D)")
    if owner.shape != features.shape[:1]:
        raise ShapeMismatch("owner", tuple(owner.shape), f"({len(features)},), one class per row of the features")
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    members = owner == torch.arange(classes, device=owner.device)[:, None]
    with torch.autocast(features.device.type, enabled=False):
        return members.to(features.dtype) @ features


def class_means(features: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Mean of the features of each class, ``(M, D) -> (K, D)``.

    Args:
        features: ``(M, D)``.
        owner: ``(M,)`` int64, the class of each row in ``0 .. K - 1``.
        counts: ``(K,)`` rows of each class, all at least 1 (a class with count 0 has no mean and becomes NaN).

    Raises:
        ShapeMismatch: as in `class_sums`, or ``counts`` is not ``(K,)``.
    """
    if counts.dim() != 1:
        raise ShapeMismatch("counts", tuple(counts.shape), "(K,), the number of rows of each class")
    sums = class_sums(features, owner, len(counts))
    return sums / counts.to(sums)[:, None]


def mean_distance(real_means: Tensor, synthetic_means: Tensor) -> Tensor:
    """The DM loss: squared distance of the means, summed (not averaged) over coordinates and classes.

    Args:
        real_means: ``(K, D)``.
        synthetic_means: ``(K, D)``.

    Returns:
        A scalar.

    Raises:
        ShapeMismatch: the shapes differ.
    """
    if synthetic_means.shape != real_means.shape:
        raise ShapeMismatch("synthetic means", tuple(synthetic_means.shape), f"{tuple(real_means.shape)} as the real")
    return (real_means - synthetic_means).square().sum()
