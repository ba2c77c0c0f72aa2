"""Reading inner feature maps of a network, with hooks that never outlive their use."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.errors import UnknownName
from dsdistill.networks.base import Network
from dsdistill.networks.probe import evaluation_mode

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
)


@contextmanager
def tapped(
    network: nn.Module, select: Sequence[str] | Callable[[str, nn.Module], bool], *, inputs: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect what chosen modules return (or receive) in the latest forward pass.

    Args:
        network: any module.
        select: names as in ``network.named_modules()``, or a predicate of name and module.
        inputs: collect the first argument of each module in place of its result.

    Yields:
        A dict from module name to tensor in order of execution, filled anew by every forward pass and part of its
        graph. The hooks are gone when the context ends, however it ends.

    Raises:
        UnknownName: a name is no module of the network.

    Example:
        >>> import torch
        >>> from dsdistill.networks import ConvNet
        >>> network = ConvNet((3, 8, 8), 10, width=4, depth=2)
        >>> with tapped(network, lambda name, module: name.endswith("act")) as maps:
        ...     _ = network(torch.zeros(1, 3, 8, 8))
        >>> {name: tuple(tensor.shape) for name, tensor in maps.items()}
        {'blocks.0.act': (1, 4, 8, 8), 'blocks.1.act': (1, 4, 4, 4)}
    """
    modules = dict(network.named_modules())
    if callable(select):
        names = [name for name, module in modules.items() if select(name, module)]
    else:
        names = [select] if isinstance(select, str) else list(select)
        for name in names:
            if name not in modules:
                raise UnknownName("module", name, [known for known in modules if known])
    found: dict[str, Tensor] = {}

    def collector(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def collect(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            found.pop(name, None)  # the dict is in order of the latest calls
            found[name] = arguments[0] if inputs else result

        return collect

    handles = [modules[name].register_forward_hook(collector(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activation_taps(network: nn.Module, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Names for `tapped` of the modules that return the maps after each activation, before pooling, in order.

    A network of this package is known by its structure. Any other is run on one blank image: its maps are the
    results ``(N, C, H, W)`` of torch's activation modules that have the shape of some convolution's result, more than
    one pixel. Of a module that is run several times in a pass, `tapped` collects the last map; activations that are
    no modules are not seen.

    Args:
        network: any module.
        shape: ``(C, H, W)`` of one image.

    Example:
        >>> from dsdistill.networks import ConvNet
        >>> activation_taps(ConvNet((3, 32, 32), 10), (3, 32, 32))
        ('blocks.0.act', 'blocks.1.act', 'blocks.2.act')
    """
    if isinstance(network, Network):
        return tuple(name for name, _ in network.named_modules() if name.rpartition(".")[2].startswith("act"))
    modules = dict(network.named_modules())
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    kinds = (nn.Conv2d, *_ACTIVATIONS)
    with evaluation_mode(network), tapped(network, lambda _, part: isinstance(part, kinds)) as found:
        network(torch.zeros(1, *shape, device=device))
    sizes = {maps.shape for name, maps in found.items() if isinstance(modules[name], nn.Conv2d)}
    activated = {name: maps for name, maps in found.items() if isinstance(modules[name], _ACTIVATIONS)}
    return tuple(name for name, maps in activated.items() if maps.shape in sizes and maps[0, 0].numel() > 1)
