"""Models of torchvision and timm by name, always with random weights: nothing is ever downloaded."""

import difflib
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dsdistill.errors import InvalidSetting, MissingExtra, UnknownName

Factory = Callable[[tuple[int, int, int], int], nn.Module]


def library_factory(name: str, stem: str | None = None) -> Factory | None:
    """A factory ``(shape, num_classes) -> nn.Module`` for "torchvision:model" or "timm:model"; None for other names.

    The factory draws from the global generators and raises InvalidSetting where the model does not fit the images.

    Args:
        name: library and model.
        stem: "small" gives models of torchvision a first convolution for small images; see `_shrink_stem`.

    Raises:
        UnknownName: the library has no such classifier.
        MissingExtra: the library is not installed.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        return _torchvision(model, small=stem == "small")
    return _timm(model) if library == "timm" else None


def _torchvision(model: str, small: bool) -> Factory:
    from torchvision import models

    known = models.list_models(module=models)
    if model not in known:
        raise _unknown("torchvision", model, known)

    def factory(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        options = _torchvision_options(model, shape)
        network = _made(f"torchvision:{model}", shape, models.get_model, model, num_classes=num_classes, **options)
        if small:
            _shrink_stem(f"torchvision:{model}", network)
        if shape[0] != 3:
            _adapt_first_conv(f"torchvision:{model}", network, shape[0])
        return network

    return factory


def _torchvision_options(model: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    options: dict[str, Any] = {"weights": None}
    if model.startswith("vit_"):
        if shape[1] != shape[2]:
            raise InvalidSetting(
                "network", f"torchvision:{model}", f"it takes square images only, not {shape}; timm's take any"
            )
        options["image_size"] = shape[1]
    elif model.startswith("maxvit_"):
        options["input_size"] = shape[1:]
    elif model in ("googlenet", "inception_v3"):
        # Without auxiliary classifiers, which would return more than logits; initialised as published.
        options |= {"aux_logits": False, "init_weights": True}
    return options


def _timm(model: str) -> Factory:
    timm = _import_timm()
    known = timm.list_models()
    if model not in known:  # this also keeps out "hf-hub:..." names, which are fetched
        raise _unknown("timm", model, known)

    def factory(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        options: dict[str, Any] = {"pretrained": False, "in_chans": shape[0], "num_classes": num_classes}
        if timm.get_pretrained_cfg(model).fixed_input_size:
            options["img_size"] = shape[1:]
        return _made(f"timm:{model}", shape, timm.create_model, model, **options)

    return factory


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "timm", "a network named 'timm:...'") from error
    module: ModuleType = timm
    return module


def _made(
    name: str, shape: tuple[int, int, int], make: Callable[..., nn.Module], model: str, **options: Any
) -> nn.Module:
    try:
        return make(model, **options)
    except Exception as error:  # each library and model has its own way to say that it does not fit
        raise InvalidSetting(
            "network", name, f"the library cannot make it for images of shape {shape}: {error}"
        ) from error


def _adapt_first_conv(name: str, network: nn.Module, channels: int) -> None:
    """Let a network for 3 channels take another number of them.

    The new weights are normal, with the spread of those replaced times sqrt(3 / channels), so that the variance of
    the result stays what the library's initialisation meant it to be; the bias is kept.

    Raises:
        InvalidSetting: no convolution takes 3 channels.
    """
    convolutions = (part for part in network.modules() if isinstance(part, nn.Conv2d))
    first = next((conv for conv in convolutions if conv.in_channels == 3 and conv.groups == 1), None)
    if first is None:
        raise InvalidSetting("network", name, f"it has no convolution of 3 channels to be made one of {channels}")
    weight = first.weight.detach()
    shape = (first.out_channels, channels, *first.kernel_size)
    first.weight = nn.Parameter(torch.randn(shape) * weight.std() * math.sqrt(3 / channels))
    first.in_channels = channels


def _shrink_stem(name: str, network: nn.Module) -> None:
    """Let a network meant for 224 pixels see images of 32 or 64: its first convolution becomes one of 3x3 and stride 1,
    freshly drawn if its kernel was larger, and pooling right after it is left out.

    These are the variants of ResNet, DenseNet, MobileNetV2, ShuffleNetV2 and the like that papers use on CIFAR.

    Raises:
        InvalidSetting: the first convolution has stride 1 already, so that there is nothing to shrink.
    """
    place, first = next((place, part) for place, part in network.named_modules() if isinstance(part, nn.Conv2d))
    if max(first.stride) == 1:
        raise InvalidSetting(
            "NetworkSpec.stem", "small", f"{name} begins with a convolution of stride 1: leave stem out"
        )
    if max(first.kernel_size) > 3:
        bias = first.bias is not None
        first = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, groups=first.groups, bias=bias)
        network.set_submodule(place, first)
    first.stride = (1, 1)
    for pooling in ("maxpool", "features.pool0"):
        if pooling in dict(network.named_modules()):
            network.set_submodule(pooling, nn.Identity())


def _unknown(library: str, model: str, known: Iterable[str]) -> UnknownName:
    names = list(known)
    near = difflib.get_close_matches(model.lower(), names, n=5, cutoff=0.0)
    hint = f"These are the nearest of {len(names)} classifiers that {library} lists."
    return UnknownName(f"{library} network", model, near, hint)
