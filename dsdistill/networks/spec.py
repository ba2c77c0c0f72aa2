"""Naming, building and refreshing networks."""

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from weakref import WeakSet

import torch
from annotated_types import Ge
from torch import nn

from dsdistill.core.config import validate
from dsdistill.core.device import resolve_device
from dsdistill.core.rng import isolated_global_rng, seed_global
from dsdistill.errors import DistillError, InvalidSetting, UnknownName
from dsdistill.networks.alexnet import AlexNet
from dsdistill.networks.base import Network, check_sizes
from dsdistill.networks.convnet import ConvNet, default_depth
from dsdistill.networks.initialize import reinitialize_
from dsdistill.networks.lenet import LeNet
from dsdistill.networks.library import Factory, library_factory
from dsdistill.networks.mlp import MLP
from dsdistill.networks.needs import Need, check_needs
from dsdistill.networks.probe import check_output, unsuitable
from dsdistill.networks.resnet import ResNet18
from dsdistill.networks.resnet_ap import ResNet18AP, ResNetAP10
from dsdistill.networks.vgg import VGG11

BUILTIN: dict[str, type[Network]] = {
    "convnet": ConvNet,
    "mlp": MLP,
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
    "resnet18_ap": ResNet18AP,
    "resnet_ap10": ResNetAP10,
}
_registered: dict[str, Factory] = {}
_seen: "WeakSet[nn.Module]" = WeakSet()  # what factories returned so far


def register_network(name: str, factory: Factory) -> None:
    """Make ``factory(shape, num_classes) -> nn.Module`` available as ``NetworkSpec(name)`` in this process.

    The factory is called once per fresh network and may draw from the global generators, which are seeded for it.

    Raises:
        InvalidSetting: the name is taken by another factory, or is empty or holds a colon.
    """
    if not name or ":" in name:
        raise InvalidSetting("name", name, "choose a non-empty name without a colon")
    if name in BUILTIN or _registered.get(name, factory) is not factory:
        raise InvalidSetting("name", name, "a network of this name is registered already; choose another name")
    _registered[name] = factory


def list_networks() -> list[str]:
    """Sorted names of the networks of this package and of those registered."""
    return sorted([*BUILTIN, *_registered])


@dataclass(frozen=True)
class NetworkSpec:
    """Which network to build; None leaves a setting at the network's own default.

    Raises:
        InvalidSetting: a value is out of range, or the network does not have that setting.
        UnknownName: the name is neither built in, registered nor has a colon.
    """

    name: str = "convnet"
    """"convnet", "mlp", "lenet", "alexnet", "vgg11", "resnet18", "resnet18_ap", "resnet_ap10", a registered name,
    "torchvision:model" or "timm:model" (random weights), or "package.module:function" of (shape, num_classes)."""
    width: Annotated[int, Ge(1)] | None = None
    """Channels of every conv (units of every hidden layer of "mlp"); None: 128."""
    depth: Annotated[int, Ge(1)] | None = None
    """Blocks; None: 3 for images up to 32 pixels, 4 up to 64, 5 above."""
    norm: Literal["none", "batch", "layer", "instance", "group"] | None = None
    """Normalisation layers; None: "instance", but "none" for "alexnet"."""
    activation: Literal["sigmoid", "relu", "leaky_relu", "swish"] | None = None
    """Activation after each norm; None: "relu"."""
    pooling: Literal["none", "max", "avg"] | None = None
    """Pooling at the end of each block; None: "avg"."""
    stem: Literal["small"] | None = None
    """Of models of torchvision: "small" begins with a 3x3 convolution of stride 1 and no pooling, for images of 32 or
    64 pixels; None: as the library has it."""

    def __post_init__(self) -> None:
        validate(self)
        if ":" not in self.name and self.name not in list_networks():
            hint = "Others: register_network, 'torchvision:model', 'timm:model', or 'package.module:function'."
            raise UnknownName("network", self.name, list_networks(), hint)
        allowed = BUILTIN[self.name].options if self.name in BUILTIN else ()
        if self.stem is not None and not self.name.startswith("torchvision:"):
            raise InvalidSetting("NetworkSpec.stem", self.stem, "only models of torchvision have this setting")
        for option, value in self._options().items():
            if option not in allowed:
                owners = [name for name, network in BUILTIN.items() if option in network.options]
                raise InvalidSetting(
                    f"NetworkSpec.{option}",
                    value,
                    f"the network {self.name!r} has no such setting; only {', '.join(owners)} have it",
                )

    def has(self, option: str) -> bool:
        """Whether the network is one of this package that takes this setting."""
        return self.name in BUILTIN and option in BUILTIN[self.name].options

    def _options(self) -> dict[str, Any]:
        names = ("width", "depth", "norm", "activation", "pooling")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check(self, shape: tuple[int, int, int], num_classes: int) -> None:
        """Refuse images or settings that the network does not fit, without making a single parameter.

        A user's factory is only imported here, and a model of a library only looked up; `require` makes one.

        Raises:
            InvalidSetting: as in `build`.
            UnknownName: the library has no model of that name.
            MissingExtra: the library is not installed.
        """
        check_sizes(shape, num_classes)
        if self.name in BUILTIN:
            self._blueprint(shape, num_classes)
        else:
            self._factory()

    def require(self, needs: Collection[Need], shape: tuple[int, int, int], num_classes: int) -> None:
        """Refuse what `check` and `build` refuse, and a network without all that a method needs of it.

        A built-in network is examined without making a single parameter; a factory or library is called once, on
        the CPU, and what it made is run.

        Args:
            needs: of "features", "maps", "batch-independent", "second-order" and "deterministic"; see `Need`.
            shape: ``(C, H, W)`` of one image.
            num_classes: number of logits.

        Raises:
            InvalidSetting: as in `build`, or a need is not met; it is named, and what would do.
            UnknownName: a need is none of these, or the library has no model of that name.
            MissingExtra: the library is not installed.
        """
        check_sizes(shape, num_classes)
        if self.name in BUILTIN:
            network: nn.Module = self._blueprint(shape, num_classes)
        else:
            network = self._call_factory(shape, num_classes, torch.Generator().manual_seed(0), torch.device("cpu"))
        check_needs(self.name, network, needs, shape)

    def _blueprint(self, shape: tuple[int, int, int], num_classes: int) -> Network:
        options = self._options()
        if self.name == "convnet":
            options.setdefault("depth", default_depth(shape))
        # Without storage: nothing is drawn from the global generators, and nothing is initialised twice.
        with torch.device("meta"):
            return BUILTIN[self.name](shape, num_classes, **options)

    def build(
        self, shape: tuple[int, int, int], num_classes: int, *, generator: torch.Generator, device: torch.device | str
    ) -> nn.Module:
        """A new network in training mode, determined by the state of ``generator`` alone.

        Args:
            shape: ``(C, H, W)`` of one image.
            num_classes: number of logits.
            generator: source of the parameters, on any device.
            device: where the network lives.

        Raises:
            InvalidSetting: the network does not fit the images, or a factory returned something unsuitable.
            UnknownName: the library has no model of that name.
            MissingExtra: the library is not installed.
            DeviceUnavailable: the device is not there.
        """
        check_sizes(shape, num_classes)
        target = resolve_device(device)
        if self.name not in BUILTIN:
            return self._call_factory(shape, num_classes, generator, target)
        network = self._blueprint(shape, num_classes).to_empty(device=target)
        reinitialize_(network, generator)
        # On the CPU, convolutions and pooling of channels-last maps are about a quarter faster.
        return network.to(memory_format=torch.channels_last) if target.type == "cpu" else network

    def refresh(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
    ) -> nn.Module:
        """The network `build` would return, bit for bit, made from one that `build` returned earlier.

        A built-in network is refilled in place and returned; a factory is called again. Either way the result is
        in training mode and its parameters want gradients as in a new network. Arguments and errors as in `build`.
        """
        if self.name not in BUILTIN:
            return self._call_factory(shape, num_classes, generator, resolve_device(device))
        reinitialize_(network, generator)
        network.zero_grad(set_to_none=True)
        return network.train().requires_grad_(True)

    def _factory(self) -> Factory:
        if self.name in _registered:
            return _registered[self.name]
        return library_factory(self.name, self.stem) or _imported(self.name)

    def _call_factory(
        self, shape: tuple[int, int, int], num_classes: int, generator: torch.Generator, device: torch.device
    ) -> nn.Module:
        factory = self._factory()
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        with isolated_global_rng(device):
            seed_global(seed, device)
            try:
                network = factory(shape, num_classes)
            except TypeError as error:
                call = (
                    f"it is called as factory({shape}, {num_classes}), with the image shape and the number of classes"
                )
                raise unsuitable(self.name, f"{call}: {error}") from error
            except DistillError:
                raise
            except Exception as error:  # it is somebody's code
                raise unsuitable(self.name, f"it failed with {type(error).__name__}: {error}") from error
            if not isinstance(network, nn.Module):
                raise unsuitable(self.name, f"it must return a torch.nn.Module, not {type(network).__name__}")
            if network in _seen:
                raise unsuitable(self.name, "it must return a new network at each call, not the same object again")
            _seen.add(network)
            network.to(device)
            check_output(self.name, network, shape, num_classes, device)
        return network


def _imported(name: str) -> Factory:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidSetting(
            "NetworkSpec.name",
            name,
            f"it cannot be imported ({error}); give 'package.module:function' of an installed package, "
            "or put its folder on PYTHONPATH",
        ) from error
    if not callable(factory):
        raise InvalidSetting("NetworkSpec.name", name, "it is not callable; name a function of (shape, num_classes)")
    made: Factory = factory
    return made
