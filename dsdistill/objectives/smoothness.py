"""How rough images are: a prior of DeepInversion (Yin et al., arXiv 1912.08795) that SRe2L keeps as an option."""

import torch
from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms, over the whole batch (N, C, H, W), of differences to the right, below and both diagonals."""
    right = images[:, :, :, :-1] - images[:, :, :, 1:]
    below = images[:, :, :-1] - images[:, :, 1:]
    falling = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    rising = images[:, :, :-1, :-1] - images[:, :, 1:, 1:]
    return torch.stack([part.norm() for part in (right, below, falling, rising)]).sum()
