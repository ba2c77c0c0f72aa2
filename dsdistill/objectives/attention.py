"""Spatial attention of feature maps (Zagoruyko & Komodakis, arXiv 1612.03928, as used by DataDAM, arXiv 2310.00093)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dsdistill.errors import ShapeMismatch

_FLOOR = 1e-12  # of a length; a map of zeros stays one


def spatial_attention(
    maps: Tensor, power: float = 4.0, normalize: Literal["l2", "l1", "none"] = "l2", floor: float = _FLOOR
) -> Tensor:
    """Where each image's features are strong: a = A / ‖A‖, A = vec(Σ_channels |h|^p), ``(M, C, H, W) -> (M, H*W)``.

    Args:
        maps: h, ``(M, C, H, W)``.
        power: p; the larger, the more the strongest features count.
        normalize: length of A that each image is divided by. With "l2" and "l1" a scaled h has the same attention.
        floor: least length that is divided by.

    Raises:
        ShapeMismatch: the maps are not four-dimensional.
    """
    if maps.dim() != 4:
        raise ShapeMismatch("feature maps", tuple(maps.shape), "(M, C, H, W)")
    if maps.dtype in (torch.float16, torch.bfloat16):
        maps = maps.float()  # a fourth power soon leaves the range of half precision
    attention = _summed(maps, power).flatten(1)
    if normalize == "none":
        return attention
    return F.normalize(attention, p=2.0 if normalize == "l2" else 1.0, dim=1, eps=floor)


def _summed(maps: Tensor, power: float) -> Tensor:
    """Σ_channels |h|^p, (M, C, H, W) -> (M, H, W); for p = 1, 2 and 4 in one pass that keeps no powers."""
    if power == 1:
        total: Tensor = torch.linalg.vector_norm(maps, 1, dim=1)
        return total
    if power not in (2, 4):
        return maps.abs().pow(power).sum(1)
    root = maps if power == 2 else maps.square()
    total = torch.linalg.vecdot(root, root, dim=1)
    return total
