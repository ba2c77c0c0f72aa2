"""What all networks of this package have in common: features, then one linear classifier."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from dsdistill.errors import InvalidSetting


class Network(nn.Module, ABC):
    """A feature extractor followed by one linear layer.

    Subclasses set `classifier` and write `embed`; ``options`` names the settings of a `NetworkSpec` they take.
    Activations of maps ``(N, C, H, W)`` are modules whose own names begin with "act" (``stem.act``, ``act1``), each
    run once and declared in order of execution; no other module has such a name.
    """

    options: ClassVar[tuple[str, ...]] = ()
    classifier: nn.Linear

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Flattened output of the last block, ``(N, C, H, W) -> (N, D)``."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``(N, C, H, W) -> (N, num_classes)``."""
        logits: Tensor = self.classifier(self.embed(images))
        return logits


class FanOutConv2d(nn.Conv2d):
    """A convolution whose fresh weights are normal with variance 2 / (kernel height * kernel width * outputs).

    He, Zhang, Ren & Sun (arXiv 1502.01852), for the backward pass; the bias is drawn as in any convolution.
    """

    @property
    def weight_std(self) -> float:
        """Standard deviation of fresh weights."""
        return math.sqrt(2 / (self.kernel_size[0] * self.kernel_size[1] * self.out_channels))

    def reset_parameters(self) -> None:
        """Draw weight and bias from the global generator, as the library does when a layer is made."""
        super().reset_parameters()
        nn.init.normal_(self.weight, 0.0, self.weight_std)


class InstanceNorm(nn.GroupNorm):
    """Group norm with one group per channel, ``(N, C, H, W) -> (N, C, H, W)``: no running statistics, affine."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Each channel of each image with mean 0 and variance 1, times weight, plus bias."""
        # The library's kernel for channels-last maps on the CPU does one value at a time below 1024 pixels; the same
        # formula in whole-tensor operations is 3 to 6 times faster there, a tenth of a ConvNet's forward pass.
        # Strides are asked because a memory format cannot be under vmap, where both ways are right.
        last = maps.device.type == "cpu" and maps.stride(1) == 1
        if not last or maps.dtype != self.weight.dtype or maps.shape[2] * maps.shape[3] >= 1024:
            return super().forward(maps)
        pixels = maps.permute(0, 2, 3, 1)
        centred = pixels - pixels.mean((1, 2), keepdim=True)
        scale = (centred.square().mean((1, 2), keepdim=True) + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias, centred, scale).permute(0, 3, 1, 2)


def normalization(kind: str, channels: int, height: int, width: int) -> nn.Module:
    """A normalisation layer for maps ``(N, channels, height, width)``, affine in every case.

    "instance" is a group norm with one group per channel (no running statistics), "group" has 4 groups, "layer"
    acts on channels, height and width together, "batch" keeps running statistics, "none" is the identity.

    Raises:
        InvalidSetting: ``kind`` is none of these, or 4 groups do not divide the channels.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "layer":
        return nn.LayerNorm([channels, height, width])
    if kind == "instance":
        return InstanceNorm(channels)
    if kind != "group":
        raise InvalidSetting("norm", kind, "choose none, batch, layer, instance or group")
    if channels % 4:
        raise InvalidSetting("width", channels, "norm='group' makes 4 groups, so the width must be a multiple of 4")
    return nn.GroupNorm(4, channels)


def small_stem(channels: int, outputs: int, norm: str, size: tuple[int, int]) -> nn.Sequential:
    """The stem of residual networks for small images: conv 3x3 of stride 1, norm, ReLU; ``size`` is (H, W)."""
    stem = nn.Sequential()
    stem.add_module("conv", nn.Conv2d(channels, outputs, 3, padding=1, bias=False))
    stem.add_module("norm", normalization(norm, outputs, *size))
    stem.add_module("act", nn.ReLU())
    return stem


def check_sizes(shape: tuple[int, int, int], num_classes: int) -> None:
    """Refuse image shapes and class counts below 1.

    Raises:
        InvalidSetting: ``shape`` is not three positive integers, or ``num_classes`` is not positive.
    """
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise InvalidSetting("shape", tuple(shape), "give (channels, height, width), each at least 1")
    if num_classes < 1:
        raise InvalidSetting("num_classes", num_classes, "there must be at least 1 class")


def check_least(name: str, shape: tuple[int, int, int], least: int) -> None:
    """Refuse images with a side below ``least`` pixels.

    Raises:
        InvalidSetting: naming the network, the images and networks that take smaller ones.
    """
    if min(shape[1:]) < least:
        raise InvalidSetting(
            "shape", shape, f"{name} needs images of at least {least} x {least} pixels; use convnet or mlp"
        )
