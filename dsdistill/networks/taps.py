"""Reading inner feature maps of a network, with hooks that never outlive their use."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dsdistill.errors import UnknownName


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
