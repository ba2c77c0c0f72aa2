"""Batch normalisation in plain operations, for derivatives that the library's own kernel gets wrong.

The library's derivative of batch normalisation along a direction is right, but the gradient of that derivative in the
maps is not: it takes the statistics of the batch for constants in places (seen in torch 2.14, errors of 4 to 30 %).
Reverse mode twice is right.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsdistill.networks.passing import takes_batch_statistics


def plain_batchnorm(network: nn.Module) -> nn.Module:
    """A copy whose batch normalisation by batch statistics is in plain operations; the network itself without any.

    Running statistics are left alone by the copy. Names and order of parameters are the network's.
    """
    if not takes_batch_statistics(network):
        return network
    made = copy.deepcopy(network)
    for name, part in list(made.named_modules()):
        if isinstance(part, _BatchNorm) and takes_batch_statistics(part):
            parent, _, own = name.rpartition(".")
            if not own:
                return PlainBatchNorm(part)
            setattr(made.get_submodule(parent), own, PlainBatchNorm(part))
    return made


class PlainBatchNorm(nn.Module):
    """Maps (N, C, ...) with mean 0 and variance 1 in each channel, times weight, plus bias."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.eps = layer.eps
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, maps: Tensor) -> Tensor:
        """Shape as given."""
        axes = [axis for axis in range(maps.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(maps.dim())]
        centred = maps - maps.mean(axes, keepdim=True)
        result = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + self.eps)
        return result if self.weight is None else result * self.weight.view(shape) + self.bias.view(shape)
