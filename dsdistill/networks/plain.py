"""What LeNet, AlexNet and VGG share: a plain row of convolutions with max pooling in between."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from dsdistill.networks.base import normalization


class Layer(NamedTuple):
    """One convolution with stride 1 and what follows it."""

    channels: int
    kernel: int
    padding: int
    pool: bool
    """Whether the map is halved after the activation, by the largest of 2 x 2 values."""


def plain_trunk(shape: tuple[int, int, int], layers: Sequence[Layer], norm: str) -> tuple[nn.Sequential, int]:
    """``len(layers)`` blocks [conv -> norm -> ReLU -> max-pool 2x2 where asked], and the size of the flattened result.

    The parts of block k are the modules ``k.conv``, ``k.norm``, ``k.act`` and ``k.pool``.

    Raises:
        InvalidSetting: the norm is unknown.
    """
    channels, height, width = shape
    blocks = []
    for layer in layers:
        conv = nn.Conv2d(channels, layer.channels, layer.kernel, padding=layer.padding)
        shrunk = layer.kernel - 1 - 2 * layer.padding
        height, width = height - shrunk, width - shrunk
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv=conv, norm=normalization(norm, layer.channels, height, width), act=nn.ReLU()
        )
        if layer.pool:
            parts["pool"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        blocks.append(nn.Sequential(parts))
        channels = layer.channels
    return nn.Sequential(*blocks), channels * height * width
