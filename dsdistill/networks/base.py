"""What all networks of this package have in common: features, then one linear classifier."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsdistill.errors import InvalidSetting


class Network(nn.Module):
    """A feature extractor followed by one linear layer.

    Subclasses set `classifier` and write `embed`; ``options`` names the settings of a `NetworkSpec` they take.
    """

    options: ClassVar[tuple[str, ...]] = ()
    classifier: nn.Linear

    def embed(self, images: Tensor) -> Tensor:
        """Flattened output of the last block, ``(N, C, H, W) -> (N, D)``."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``(N, C, H, W) -> (N, num_classes)``."""
        logits: Tensor = self.classifier(self.embed(images))
        return logits


class AveragePool(nn.Module):
    """Mean over 2x2 windows with stride 2, ``(N, C, H, W) -> (N, C, H // 2, W // 2)``.

    Equal to `torch.nn.AvgPool2d` of size 2: weights of 1/4 are exact in binary, so nothing but the order of
    three additions could differ.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Means of the windows; an odd last row or column is left out."""
        # On the CPU the library's average pooling of contiguous float32 runs on one value at a time; the same mean
        # as a depthwise convolution is vectorised and saves about 20 % of a whole ConvNet forward pass.
        # Autocast would round it, and channels-last memory has no need of it.
        plain = images.device.type == "cpu" and images.dtype == torch.float32 and images.is_contiguous()
        if plain and not torch.is_autocast_enabled("cpu"):
            channels = images.shape[1]
            return F.conv2d(images, images.new_full((channels, 1, 2, 2), 0.25), stride=2, groups=channels)
        return F.avg_pool2d(images, 2)


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
        return nn.GroupNorm(channels, channels)
    if kind != "group":
        raise InvalidSetting("norm", kind, "choose none, batch, layer, instance or group")
    if channels % 4:
        raise InvalidSetting("width", channels, "norm='group' makes 4 groups, so the width must be a multiple of 4")
    return nn.GroupNorm(4, channels)


def check_sizes(shape: tuple[int, int, int], num_classes: int) -> None:
    """Refuse image shapes and class counts below 1.

    Raises:
        InvalidSetting: ``shape`` is not three positive integers, or ``num_classes`` is not positive.
    """
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise InvalidSetting("shape", tuple(shape), "give (channels, height, width), each at least 1")
    if num_classes < 1:
        raise InvalidSetting("num_classes", num_classes, "there must be at least 1 class")
