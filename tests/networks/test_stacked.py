"""Several networks of one kind in one pass, with stacked parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from dsdistill.networks import NetworkSpec
from dsdistill.networks.base import InstanceNorm
from dsdistill.networks.spec import BUILTIN

NUMBER = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(spec, shape):
    return [spec.build(shape, 4, generator=seeded(seed), device="cpu") for seed in range(NUMBER)]


def stacked(networks):
    """Parameters and buffers ``(number, ...)`` and a function of them and of images."""
    parameters, buffers = stack_module_state(networks)
    skeleton = copy.deepcopy(networks[0]).to("meta")
    return parameters, buffers, lambda p, b, images: functional_call(skeleton, (p, b), (images,))


def specs():
    for name, network in BUILTIN.items():
        norms = ("none", "layer", "instance", "group") if name in ("convnet", "alexnet") else (None,)
        for norm in norms if "norm" in network.options else (None,):
            yield pytest.param(NetworkSpec(name, norm=norm), id=f"{name}-{norm}")


@pytest.mark.parametrize("spec", list(specs()))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_stacked_logits_equal_those_of_each_network(spec, memory_format):
    shape = (3, 32, 32) if spec.name == "vgg11" else (3, 16, 18)
    networks = built(spec, shape)
    images = torch.randn(2, *shape, generator=seeded(9)).to(memory_format=memory_format)
    parameters, buffers, call = stacked(networks)
    with torch.no_grad():
        together = vmap(call, in_dims=(0, 0, None), randomness="error")(parameters, buffers, images)
        alone = torch.stack([network(images) for network in networks])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["convnet", "resnet_ap10"])
def test_stacked_gradients_equal_those_of_each_network(name):
    spec = NetworkSpec(name, width=8) if name == "convnet" else NetworkSpec(name)
    networks = [network.double() for network in built(spec, (3, 8, 8))]
    images = torch.randn(NUMBER, 4, 3, 8, 8, generator=seeded(9), dtype=torch.float64)
    targets = torch.arange(4)
    parameters, buffers, call = stacked(networks)

    def loss(p, b, views):
        return F.cross_entropy(call(p, b, views), targets)

    together = vmap(grad(loss), randomness="error")(parameters, buffers, images)
    for index, network in enumerate(networks):
        F.cross_entropy(network(images[index]), targets).backward()
        for key, parameter in network.named_parameters():
            torch.testing.assert_close(together[key][index], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (32, 32)])
def test_stacked_instance_norm_equals_the_library(memory_format, size):
    weight, bias = torch.rand(2, NUMBER, 5, generator=seeded(), dtype=torch.float64).unbind(0)
    maps = torch.randn(2, 5, *size, generator=seeded(1), dtype=torch.float64).to(memory_format=memory_format)
    norm = InstanceNorm(5).double()

    def call(w, b):
        return functional_call(norm, {"weight": w, "bias": b}, (maps * w.sum(),))

    together = vmap(call)(weight, bias)
    for index in range(NUMBER):
        expected = nn.functional.group_norm(maps * weight[index].sum(), 5, weight[index], bias[index])
        torch.testing.assert_close(together[index], expected)
