"""Image operations with explicit parameters, each image its own; linear or affine in the images.

Nothing is drawn here. On CUDA the gradients of `scale` and `rotate` are summed in no fixed order.

All take images ``(M, C, H, W)`` of any floating type and parameters ``(M,)``, and return ``(M, C, H, W)``.
Formulas: Zhao & Bilen, Differentiable Siamese Augmentation (arXiv 2102.08259).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


# The colour operations are written as x + (x - m)(f - 1) rather than (x - m) f + m: equal, and exact at f = 1.


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add ``brightness``, then scale the distance to each pixel's mean over channels by ``saturation``, then the
    distance to the image's mean by ``contrast``. Neutral: 0, 1, 1."""
    images = images + _per_image(brightness)
    images = images + (images - images.mean(1, keepdim=True)) * _per_image(saturation - 1)
    return images + (images - images.mean((1, 2, 3), keepdim=True)) * _per_image(contrast - 1)


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Pixel (i, j) of the result is pixel (i + ``down``, j + ``right``) of the image, 0 outside; whole pixels."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + down.round().long()[:, None]
    columns = torch.arange(width, device=images.device) + right.round().long()[:, None]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    moved = images.gather(2, rows.clamp(0, height - 1)[:, None, :, None].expand(images.shape))
    moved = moved.gather(3, columns.clamp(0, width - 1)[:, None, None].expand(images.shape))
    return torch.where(inside, moved, moved.new_zeros(()))


def cutout(images: Tensor, row: Tensor, column: Tensor, size: tuple[int, int]) -> Tensor:
    """Zero a rectangle of ``size`` (height, width) pixels around (``row``, ``column``), clipped at the borders.

    The rectangle starts half its size (rounded down) before the centre.
    """
    rows = torch.arange(images.shape[2], device=images.device) - row.round().long()[:, None] + size[0] // 2
    columns = torch.arange(images.shape[3], device=images.device) - column.round().long()[:, None] + size[1] // 2
    hole = ((rows >= 0) & (rows < size[0]))[:, None, :, None] & ((columns >= 0) & (columns < size[1]))[:, None, None]
    return torch.where(hole, images.new_zeros(()), images)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the width of the images whose ``mirrored`` is not 0."""
    return torch.where(_per_image(mirrored) != 0, images.flip(3), images)


def scale(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Shrink the width by ``across`` and the height by ``down`` about the centre (below 1: enlarge); bilinear."""
    x, y = _centred(images)
    return _warp(images, x * _plane(across), y * _plane(down))


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate about the centre by ``angle`` radians, bilinear, 0 outside. Angles are true ones on oblong images too."""
    height, width = images.shape[2:]
    x, y = _centred(images)
    cos, sin = _plane(angle.cos()), _plane(angle.sin())
    return _warp(images, cos * x - sin * y * (height / width), sin * x * (width / height) + cos * y)


def _plane(values: Tensor) -> Tensor:
    return values[:, None, None]


def _warp(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    shape = (len(images), *images.shape[2:])
    grid = torch.stack([across.expand(shape), down.expand(shape)], 3)
    warped: Tensor = _Warp.apply(images, grid)
    return warped


def _centred(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres ``(1, 1, W)`` and ``(1, H, 1)`` in -1 .. 1, where the borders of the image are -1 and 1.

    Computed elementwise: a grid made by matrix products would be rounded where fast matrix modes are on.
    """
    height, width = images.shape[2:]
    x = (torch.arange(width, device=images.device, dtype=images.dtype) * 2 + 1) / width - 1
    y = (torch.arange(height, device=images.device, dtype=images.dtype) * 2 + 1) / height - 1
    return x[None, None, :], y[None, :, None]


class _Warp(torch.autograd.Function):
    """Bilinear sampling of images at fixed points: linear in the images, so its adjoint is all calculus needs.

    The library's own operation has no second derivative; a linear map and its adjoint, each the derivative of the
    other, have all of them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _WarpAdjoint.apply(gradient, ctx.saved_tensors[0]), None


class _WarpAdjoint(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, grid: Tensor) -> Tensor:
        # The second argument gives the shape of the images only; their values matter to the grid's gradient alone.
        pulled: Tensor = torch.ops.aten.grid_sampler_2d_backward(
            gradient.contiguous(), gradient, grid, 0, 0, False, [True, False]
        )[0]
        return pulled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Warp.apply(gradient, ctx.saved_tensors[0]), None
