"""A trained network that says how far the statistics of its inputs are from those of its training images.

Batch normalisation in evaluation mode keeps, for each channel of what it receives, the mean μ and variance σ² of the
training images. SRe2L (Yin et al., arXiv 2306.13092) and its successors ask synthetic images to have the same. For the
input u of layer ℓ over a group of images, with mean m and biased variance v over images and pixels of each channel::

    r_ℓ = ‖m_ℓ − μ_ℓ‖₂ + ‖v_ℓ − σ²_ℓ‖₂          (norms over channels)

The gradient has a closed form, n values of a channel being averaged, which is made in the same pass as that of the
layer itself and needs nothing kept but u::

    ∂r/∂u = (m − μ) / (n ‖m − μ‖) + 2 (u − m)(v − σ²) / (n ‖v − σ²‖),     each term 0 where its norm is 0
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dsdistill.errors import InvalidSetting
from dsdistill.networks.small_maps import SmallMapConv


class MeasuredNetwork:
    """A network in evaluation mode whose batch norms are measured; the given one is left alone, parameters are shared.

    Attributes:
        module: the network as it is run.
        layers: names of the batch norms that have running statistics, in the order in which modules are registered.
        channels: of those among them that were run in the latest call.

    Args:
        network: with batch normalisation that keeps running statistics.
        name: what to call it in messages.

    Raises:
        InvalidSetting: there is no such layer.
    """

    def __init__(self, network: nn.Module, name: str = "the network") -> None:
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        self.module = copy.deepcopy(network, shared).eval().requires_grad_(False)
        self._tape: dict[int, Tensor] = {}
        found = [
            (place, part)
            for place, part in self.module.named_modules()
            if isinstance(part, _BatchNorm) and part.running_mean is not None
        ]
        if not found:
            raise InvalidSetting(
                "network", name, "it needs batch normalisation with running statistics: choose norm='batch'"
            )
        self.layers = tuple(place for place, _ in found)
        self.channels: tuple[int, ...] = ()
        self._norms = []
        for number, (place, part) in enumerate(found):
            measured = _MeasuredNorm(part, number, self._tape)
            self._norms.append(measured)
            self._put(place, measured)
        for place, module in [*self.module.named_modules()]:
            if SmallMapConv.suits(module):
                self._put(place, SmallMapConv(module))

    def _put(self, place: str, part: nn.Module) -> None:
        if place:
            self.module.set_submodule(place, part)
        else:
            self.module = part

    def __call__(self, images: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Logits, and the distances of every layer that is run; differentiable once in the images.

        Args:
            images: (groups * B, C, H, W), group after group; each has statistics of its own.
            groups: G.

        Returns:
            Logits (groups * B, K), and r (G, L), float32 or finer, of the L layers that are run, in their order.

        Raises:
            InvalidSetting: the images are no multiple of ``groups``.
        """
        if len(images) % groups:
            raise InvalidSetting("groups", groups, f"a divisor of the {len(images)} images")
        for norm in self._norms:
            norm.groups = groups
        self._tape.clear()
        logits: Tensor = self.module(images)
        distances = torch.stack([self._tape[number] for number in sorted(self._tape)], 1)
        self.channels = tuple(self._norms[number].channels for number in sorted(self._tape))
        self._tape.clear()
        return logits, distances


class _MeasuredNorm(nn.Module):
    """Batch normalisation by running statistics that puts r of its input on a tape, under its number."""

    def __init__(self, layer: _BatchNorm, number: int, tape: dict[int, Tensor]) -> None:
        super().__init__()
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.number, self.tape, self.groups, self.channels = number, tape, 1, layer.num_features
        self.register_buffer("mean", layer.running_mean)
        self.register_buffer("variance", layer.running_var)
        scale = torch.rsqrt(layer.running_var + layer.eps)
        scale = scale if layer.weight is None else scale * layer.weight.detach()
        self.register_buffer("scale", scale)
        shift = -layer.running_mean * scale
        self.register_buffer("shift", shift if layer.bias is None else shift + layer.bias.detach())

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, ...) as given."""
        result, distance = _Measure.apply(maps, self.mean, self.variance, self.scale, self.shift, self.groups)
        # A layer that is run several times counts as often.
        self.tape[self.number] = self.tape.get(self.number, 0) + distance
        return result  # type: ignore[no-any-return]


class _Measure(torch.autograd.Function):
    """(u, μ, σ², scale, shift, G) -> (u * scale + shift, r (G,))."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, groups: int
    ) -> tuple[Tensor, Tensor]:
        found_mean, found_variance = group_moments(maps, groups)
        of_mean, of_variance = found_mean - mean, found_variance - variance
        mean_norm, variance_norm = of_mean.norm(dim=1), of_variance.norm(dim=1)
        ctx.save_for_backward(maps, found_mean, of_mean, of_variance, mean_norm, variance_norm, scale)
        ctx.groups = groups
        return _affine(maps, scale, shift), mean_norm + variance_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_result: Tensor, of_distance: Tensor) -> tuple[Tensor | None, ...]:
        maps, found_mean, of_mean, of_variance, mean_norm, variance_norm, scale = ctx.saved_tensors
        averaged = maps.numel() // (maps.shape[1] * ctx.groups)
        # ∂r/∂u = slope * u + offset in each channel of each group.
        slope = of_variance * _share(2 * of_distance / averaged, variance_norm)
        offset = of_mean * _share(of_distance / averaged, mean_norm) - slope * found_mean
        gradient = torch.empty_like(maps)
        parts = [tensor.chunk(ctx.groups) for tensor in (gradient, maps, of_result)]
        for part, group, above, factor, more in zip(*parts, slope, offset, strict=True):
            # Two passes over the maps in all.
            torch.addcmul(_spread(more, maps), group, _spread(factor, maps), out=part)
            part.addcmul_(above, _spread(scale, maps))
        return gradient, None, None, None, None, None


def group_moments(maps: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (G, C) of each channel of maps (G * B, C, ...) over each group, float32 or finer."""
    wide = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
    found = [_moments(part) for part in wide.chunk(groups)]
    return torch.stack([mean for mean, _ in found]), torch.stack([variance for _, variance in found])


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    if maps.device.type in ("cpu", "cuda"):
        # What batch normalisation itself counts with: 14 to 40 times as quick as `torch.var_mean` on a CPU.
        return torch.batch_norm_update_stats(maps, None, None, 0.0)
    axes = [axis for axis in range(maps.dim()) if axis != 1]
    variance, mean = torch.var_mean(maps, axes, correction=0)
    return mean, variance


def _affine(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In float32 at least: half precision would round the shift before it cancels against the mean."""
    wide = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
    return torch.addcmul(_spread(shift, wide), wide, _spread(scale, wide)).to(maps.dtype)


def _spread(values: Tensor, maps: Tensor) -> Tensor:
    """(C,) of the channels of maps (N, C, ...), in their type."""
    return values.to(maps.dtype).view(-1, *[1] * (maps.dim() - 2))


def _share(numerator: Tensor, norm: Tensor) -> Tensor:
    """(G, 1): numerator / norm, 0 where the norm is."""
    return torch.where(norm > 0, numerator / norm.where(norm > 0, torch.ones_like(norm)), 0).unsqueeze(1)
