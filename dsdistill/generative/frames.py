"""Between the images of a run and what an autoencoder takes: squares of fixed side with pixels in [-1, 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from dsdistill.data import Normalization


@dataclass(frozen=True)
class Frame:
    """Images (C, H, W) as squares of ``side`` pixels and ``channels`` channels.

    Images that are smaller get their last row and column repeated, which `restored` cuts off again; with ``resize``
    they are resized, bicubically and antialiased, in both directions. Where the model has other channels than the
    images, grey is repeated, and colours are averaged.
    """

    shape: tuple[int, int, int]
    normalization: Normalization
    side: int
    channels: int
    resize: bool = False

    def squares(self, images: Tensor) -> Tensor:
        """Standardised images (B, C, H, W) as (B, channels, side, side), float32 in [-1, 1]."""
        pixels = 2 * self.normalization.to_unit(images) - 1
        _, height, width = self.shape
        if self.resize and (height, width) != (self.side, self.side):
            pixels = _resized(pixels, self.side, self.side)
        elif not self.resize:
            pixels = pad(pixels, (0, self.side - width, 0, self.side - height), mode="replicate")
        return _with_channels(pixels, self.channels)

    def restored(self, squares: Tensor) -> Tensor:
        """Squares, cut off at [-1, 1], as standardised images (B, C, H, W)."""
        channels, height, width = self.shape
        pixels = _with_channels(squares.float().clamp(-1, 1), channels)
        if self.resize and (height, width) != (self.side, self.side):
            pixels = _resized(pixels, height, width).clamp(-1, 1)
        return self.normalization.standardize((pixels[:, :, :height, :width] + 1) / 2)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    return interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    if pixels.shape[1] == channels:
        return pixels
    return torch.mean(pixels, 1, keepdim=True).expand(-1, channels, -1, -1)
