"""Drawing fresh parameters into an existing network, and telling two networks apart."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from dsdistill.errors import InvalidSetting
from dsdistill.networks.base import FanOutConv2d, Network
from dsdistill.networks.taps import tapped


@torch.no_grad()
def reinitialize_(module: nn.Module, generator: torch.Generator) -> None:
    """Give a network fresh parameters in place, from PyTorch's default distribution.

    Weights and biases of convolutions and linear layers are uniform in +-1/sqrt(fan_in), weights of a `FanOutConv2d`
    normal; norm layers get weight 1, bias 0 and fresh running statistics. Everything uniform is drawn at once, then
    everything normal, in float32 on the generator's device, so the values depend on neither the network's device,
    precision nor memory format. Modes and gradient flags are kept.

    Raises:
        TypeError: a submodule of another type has parameters; nothing has been changed then.
    """
    uniform: list[tuple[Tensor, float]] = []  # parameters with their bounds
    normal: list[tuple[Tensor, float]] = []  # parameters with their standard deviations
    norms: list[nn.Module] = []
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, _ConvNd)):
            bound = 1 / math.sqrt(part.weight[0].numel())
            for parameter in part.parameters(recurse=False):
                if isinstance(part, FanOutConv2d) and parameter is part.weight:
                    normal.append((parameter, part.weight_std))
                else:
                    uniform.append((parameter, bound))
        elif isinstance(part, (nn.GroupNorm, nn.LayerNorm, _NormBase)):
            norms.append(part)
        elif next(part.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"cannot re-initialise {name or 'the network'} ({type(part).__name__}): only convolutions, linear and "
                "norm layers are known; register a factory that builds the network instead"
            )
    for target, values, bound in _drawn(torch.rand, uniform, generator):
        target.copy_(values.mul_(2 * bound).sub_(bound))
    for target, values, std in _drawn(torch.randn, normal, generator):
        target.copy_(values.mul_(std))
    for norm in norms:
        for name, parameter in norm.named_parameters(recurse=False):
            parameter.fill_(1.0 if name == "weight" else 0.0)
        if isinstance(norm, _NormBase):
            norm.reset_running_stats()


def _drawn(
    draw: Callable[..., Tensor], spreads: Sequence[tuple[Tensor, float]], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Each parameter with fresh numbers of its shape on its device and its spread; one draw, one transfer."""
    if not spreads:
        return
    sizes = [parameter.numel() for parameter, _ in spreads]
    numbers = draw(sum(sizes), generator=generator, device=generator.device)
    numbers = numbers.to(spreads[0][0].device, non_blocking=True)
    for (parameter, spread), values in zip(spreads, torch.split(numbers, sizes), strict=True):
        yield parameter, values.view(parameter.shape), spread


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Features before the classifier, ``(N, C, H, W) -> (N, D)``.

    A network with an ``embed`` method is asked; of any other the input of the last linear layer it runs is taken.

    Raises:
        InvalidSetting: the network has no ``embed`` method and runs no `torch.nn.Linear`.
    """
    method = getattr(network, "embed", None)
    # A submodule that happens to be called "embed" (patch or token embedding) is something else.
    if isinstance(network, Network) or (callable(method) and not isinstance(method, nn.Module)):
        features: Tensor = network.embed(images)  # type: ignore[operator]
        return features.flatten(1)
    with tapped(network, lambda _, part: isinstance(part, nn.Linear), inputs=True) as found:
        network(images)
    if not found:
        raise InvalidSetting(
            "network", type(network).__name__, "to have features it needs an embed(images) method or a torch.nn.Linear"
        )
    return list(found.values())[-1].flatten(1)


def has_batchnorm(network: nn.Module) -> bool:
    """Whether any layer couples the images of a batch through batch statistics."""
    return any(isinstance(part, _BatchNorm) for part in network.modules())


def parameter_digest(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers: equal if and only if they are."""
    digest = hashlib.sha256()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
