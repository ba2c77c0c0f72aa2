"""What a method may need of a network: a closed vocabulary, and the check that a network has it."""

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dsdistill.core.rng import isolated_global_rng, seed_global
from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.networks.initialize import embed, has_batchnorm
from dsdistill.networks.probe import student_mode
from dsdistill.networks.taps import activation_taps

Need = Literal["features", "maps", "batch-independent", "second-order", "deterministic"]
"""One thing that a method may need of a network:

"features"
    `embed` finds a vector for each image.
"maps"
    `activation_taps` finds at least 2 feature maps.
"batch-independent"
    the result for an image does not depend on the other images of its batch, as with batch normalisation.
"second-order"
    gradients with respect to parameters can be differentiated again.
"deterministic"
    it makes the same of the same images every time, in training mode but with layers of dropout silenced, which is how
    methods look at images: it neither draws random numbers nor remembers.
"""


def check_needs(name: str, network: nn.Module, needs: Collection[Need], shape: tuple[int, int, int]) -> None:
    """Refuse a network that lacks something of ``needs``.

    The network is run on 2 random images in its present mode, or in that of the need; statistics of norm layers may
    move and gradients remain: pass one made for the purpose. It may be on the meta device, where nothing is computed:
    coupling of a batch is known from the kinds of layers alone, and nothing is said against "deterministic".

    Args:
        name: what the network is called in messages.
        network: any module that returns logits.
        needs: see `Need`.
        shape: ``(C, H, W)`` of one image.

    Raises:
        UnknownName: a need is none of the vocabulary.
        InvalidSetting: naming the first need that is not met, the network, and what would do.
    """
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    random = torch.device("cpu") if device.type == "meta" else device
    with isolated_global_rng(random):
        seed_global(0, random)  # dropout draws from the global generators
        for need in needs:
            if need not in _PROBLEMS:
                raise UnknownName("need of a network", need, _PROBLEMS)
            problem = _PROBLEMS[need](network, images.clone())
            if problem:
                raise InvalidSetting("network", name, f"the method needs {need!r} of its network, but {problem}")


def _features_problem(network: nn.Module, images: Tensor) -> str:
    try:
        with torch.no_grad():
            features = embed(network, images)
    except InvalidSetting as error:
        return f"this one has no features; {error.allowed}"
    if len(features) == 2:
        return ""
    return (
        f"this one has features of shape {tuple(features.shape)} for 2 images; choose one whose last torch.nn.Linear "
        "takes one row per image, or give it an embed(images) method"
    )


def _maps_problem(network: nn.Module, images: Tensor) -> str:
    taps = activation_taps(network, _shape(images))
    if len(taps) >= 2:
        return ""
    return (
        f"this one has {len(taps)} after activations of convolutions, where 2 are the least; choose convnet (2 blocks "
        "or more), lenet, alexnet, vgg11 or a resnet, or a network whose activations are modules"
    )


def _coupling_problem(network: nn.Module, images: Tensor) -> str:
    mend = "choose norm='instance', 'group' or 'layer', or another network"
    if has_batchnorm(network):
        return f"batch normalisation makes the result of an image of this one depend on its batch; {mend}"
    if images.is_meta:
        return ""
    (gradient,) = torch.autograd.grad(network(images.requires_grad_())[0].sum(), images)
    return f"the result of an image of this one depends on the others of its batch; {mend}" if gradient[1].any() else ""


def _second_order_problem(network: nn.Module, images: Tensor) -> str:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    loss = network(images.requires_grad_()).square().sum()
    try:
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        length = torch.stack([gradient.square().sum() for gradient in first if gradient is not None]).sum()
        # Through the whole graph: on the way to chosen inputs, a function marked as differentiable once is passed by.
        torch.autograd.backward(length)
    except RuntimeError as error:
        return (
            f"an operation of this one can be differentiated once only ({error}); choose a network of this package, "
            "or one of convolutions and linear layers"
        )
    return ""


@torch.no_grad()
def _chance_problem(network: nn.Module, images: Tensor) -> str:
    if images.is_meta:
        return ""
    mend = (
        "choose a network without stochastic depth, random pooling and functional dropout, set their rates to 0, or "
        "drop out by modules (torch.nn.Dropout), which are silenced"
    )
    with student_mode(network):
        # What a rare draw does seldom shows in two results: the generators tell.
        before = _random_states(images.device)
        first = network(images)
        if not all(map(torch.equal, before, _random_states(images.device))):
            return f"this one draws random numbers while it looks at images; {mend}"
        seed_global(1, images.device)
        second = network(images)
    if torch.allclose(first, second, equal_nan=True):
        return ""
    return f"this one gives other results when it looks at the same images again; {mend}"


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def _shape(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


_PROBLEMS: Mapping[Need, Callable[[nn.Module, Tensor], str]] = {
    "features": _features_problem,
    "maps": _maps_problem,
    "batch-independent": _coupling_problem,
    "second-order": _second_order_problem,
    "deterministic": _chance_problem,
}
