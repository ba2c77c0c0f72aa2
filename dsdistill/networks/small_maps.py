"""Convolutions of frozen networks as matrix products, where the maps that they make are small, on CPUs.

With channels last, the library's kernels make maps of 4x4 pixels and 512 channels at a third of the rate, in operations
per second, at which they make the larger maps of a ResNet-18.
"""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

SMALL_MAP = 16
"""Pixels of a map up to which the convolution that makes it is a product."""


class SmallMapConv(nn.Module):
    """A convolution with fixed weights; differentiable once in its maps."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    @staticmethod
    def suits(part: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether it is a convolution as the library has it; hooks may make its weights only when it is called."""
        return (
            type(part) is nn.Conv2d
            and part.groups == 1
            and part.dilation == (1, 1)
            and part.padding_mode == "zeros"
            and not isinstance(part.padding, str)
            and not part._forward_pre_hooks
            and not part._forward_hooks
            and not part.weight.requires_grad
        )

    def __getattr__(self, name: str) -> Any:
        """What networks read of their convolutions, ``weight`` say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, maps: Tensor) -> Tensor:
        """As the convolution."""
        layer = self.layer
        assert not isinstance(layer.padding, str)
        if maps.dim() != 4 or maps.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return layer(maps)  # type: ignore[no-any-return]
        sides = zip(maps.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
        made = [(side + 2 * edge - kernel) // stride + 1 for side, kernel, stride, edge in sides]
        if min(made) < 1 or math.prod(made) > SMALL_MAP:
            return layer(maps)  # type: ignore[no-any-return]
        result: Tensor = _ConvByProduct.apply(maps, layer.weight, layer.stride, layer.padding)
        return result if layer.bias is None else result + layer.bias.view(-1, 1, 1)


class _ConvByProduct(torch.autograd.Function):
    """(maps, constant weight, stride, padding) -> convolution, channels last."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = maps.shape, stride, padding
        (down, right), (height, width) = padding, weight.shape[2:]
        padded = pad(maps.permute(0, 2, 3, 1), (0, 0, right, right, down, down))
        # (N, H', W', C, height, width): what each pixel of the result is made of.
        patches = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1])
        rows = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return (rows @ _matrix(weight).T).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        (count, channels, height, width), (down, right) = ctx.shape, ctx.padding
        of_rows = of_result.permute(0, 2, 3, 1) @ _matrix(weight)
        of_rows = of_rows.view(*of_rows.shape[:3], *weight.shape[2:], channels)
        of_padded = of_rows.new_zeros(count, height + 2 * down, width + 2 * right, channels)
        for y in range(weight.shape[2]):
            for x in range(weight.shape[3]):
                seen = (slice(None), *map(_strided, (y, x), ctx.stride, of_rows.shape[1:3]))
                of_padded[seen] += of_rows[:, :, :, y, x]
        of_maps = of_padded[:, down : down + height, right : right + width].permute(0, 3, 1, 2)
        return of_maps, None, None, None


def _matrix(weight: Tensor) -> Tensor:
    """(outputs, height * width * inputs) of a convolution's weight; no copy where channels are last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _strided(first: int, stride: int, count: int) -> slice:
    return slice(first, first + stride * (count - 1) + 1, stride)
