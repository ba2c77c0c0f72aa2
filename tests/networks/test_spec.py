import sys
import types

import pytest
import torch
from torch import nn

from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import DeviceUnavailable, InvalidSetting, UnknownName
from dsdistill.networks import MLP, ConvNet, NetworkSpec, ResNet18, list_networks, parameter_digest, register_network
from dsdistill.networks import spec as spec_module
from dsdistill.networks.spec import BUILTIN

SHAPE = (3, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(spec, seed=0, shape=SHAPE, num_classes=4):
    return spec.build(shape, num_classes, generator=seeded(seed), device="cpu")


def refresh(spec, network, seed=0, shape=SHAPE, num_classes=4):
    return spec.refresh(network, shape, num_classes, generator=seeded(seed), device="cpu")


def small(shape, num_classes):
    layers = [nn.Conv2d(shape[0], 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5, num_classes))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(spec_module, "_registered", {"small": small})
    module = types.ModuleType("someones_networks")
    module.small, module.number = small, 3
    monkeypatch.setitem(sys.modules, "someones_networks", module)


BUILTINS = ["alexnet", "convnet", "lenet", "mlp", "resnet18", "resnet18_ap", "resnet_ap10", "vgg11"]

SPECS = [
    {"name": "convnet", "width": 8, "norm": "batch"},
    {"name": "mlp", "width": 8},
    {"name": "alexnet", "norm": "batch"},
    {"name": "resnet_ap10"},
    {"name": "resnet_ap10", "norm": "none"},
    {"name": "small"},
    {"name": "someones_networks:small"},
]


@pytest.mark.parametrize("arguments", SPECS, ids=lambda arguments: arguments["name"])
def test_build_and_refresh_are_determined_by_the_generator(arguments):
    spec = NetworkSpec(**arguments)
    state = torch.get_rng_state()
    network = build(spec, 3)
    digest = parameter_digest(network)
    torch.rand(7)
    assert parameter_digest(build(spec, 3)) == digest
    assert parameter_digest(build(spec, 4)) != digest
    network(torch.randn(4, *SHAPE)).sum().backward()
    network.eval().requires_grad_(False)
    torch.set_rng_state(state)
    again = refresh(spec, network, 3)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was disturbed"
    assert parameter_digest(again) == digest
    assert all(part.training for part in again.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in again.parameters())
    assert (again is network) == (spec.name in BUILTINS)
    assert parameter_digest(refresh(spec, again, 4)) != digest


def test_build_leaves_the_callers_random_state_alone():
    state = torch.get_rng_state()
    for arguments in SPECS:
        build(NetworkSpec(**arguments))
    assert torch.equal(torch.get_rng_state(), state)


def test_defaults_are_those_of_the_networks():
    network = build(NetworkSpec(), shape=(3, 64, 64))
    assert isinstance(network, ConvNet)
    assert len(network.blocks) == 4
    assert network.classifier.in_features == 2048
    assert len(build(NetworkSpec(), shape=(3, 4, 4)).blocks) == 2
    assert isinstance(build(NetworkSpec("mlp")), MLP)
    assert isinstance(build(NetworkSpec("resnet18", norm="batch")), ResNet18)


SIZES = [(1, 28, 28), (3, 32, 32), (3, 33, 47), (4, 64, 40), (3, 96, 100), (3, 128, 128), (3, 130, 224), (3, 224, 224)]


@pytest.mark.parametrize("name", BUILTINS)
def test_all_networks_take_images_from_28_to_224_pixels(name):
    for shape in SIZES:
        NetworkSpec(name).require(["features"], shape, 7)


@pytest.mark.parametrize("name", [name for name in BUILTINS if "norm" in BUILTIN[name].options])
def test_all_norms_fit_maps_of_odd_sizes(name):
    for norm in ("none", "batch", "layer", "instance", "group"):
        NetworkSpec(name, norm=norm).require(["features"], (3, 45, 67), 7)


def test_settings_reach_the_network():
    spec = NetworkSpec("convnet", width=6, depth=1, norm="none", activation="swish", pooling="max")
    block = build(spec).blocks[0]
    kinds = [type(part) for part in (block.conv, block.norm, block.act, block.pool)]
    assert kinds == [nn.Conv2d, nn.Identity, nn.SiLU, nn.MaxPool2d]
    assert block.conv.out_channels == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet18", "depth": 3}, "only convnet have it"),
        ({"name": "mlp", "norm": "batch"}, "only convnet, alexnet, vgg11, resnet18, resnet18_ap, resnet_ap10 have it"),
        ({"name": "small", "width": 3}, "only convnet, mlp have it"),
        ({"name": "a.b:c", "pooling": "max"}, "only convnet have it"),
        ({"width": 0}, "greater than or equal to 1"),
        ({"norm": "spectral"}, "NetworkSpec.norm"),
    ],
)
def test_settings_a_network_lacks_are_refused(arguments, message):
    with pytest.raises(InvalidSetting, match=message):
        NetworkSpec(**arguments)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'convnet'") as error:
        NetworkSpec("ConvNte")
    assert error.value.kind == "network"
    assert error.value.known == tuple(sorted([*BUILTINS, "small"]))
    with pytest.raises(UnknownName, match="did you mean 'resnet_ap10'"):
        NetworkSpec("ResNetAP-10")


def test_register_and_list():
    register_network("mine", small)
    register_network("mine", small)
    assert list_networks() == sorted([*BUILTINS, "mine", "small"])
    assert isinstance(build(NetworkSpec("mine")), nn.Sequential)
    for name, factory in (("mine", lambda shape, classes: None), ("convnet", small), ("a:b", small), ("", small)):
        with pytest.raises(InvalidSetting, match="choose"):
            register_network(name, factory)


@pytest.mark.parametrize(
    "name", ["no_such_module_here:f", "someones_networks:absent", "someones_networks:number", ":f"]
)
def test_factories_that_cannot_be_found(name):
    with pytest.raises(InvalidSetting, match="name"):
        build(NetworkSpec(name))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda shape, classes: 3, "not int"),
        (lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(192, 9)), r"logits \(2, 4\), not \(2, 9\)"),
        (lambda shape, classes: nn.Linear(5, 4), "fails on images"),
        (lambda shape, classes: nn.LSTM(8, 4).double(), "fails on images"),
    ],
)
def test_unsuitable_factories_are_named(factory, message):
    register_network("bad", factory)
    with pytest.raises(InvalidSetting, match=message) as error:
        build(NetworkSpec("bad"))
    assert "'bad'" in str(error.value)


def test_networks_that_return_no_tensor_are_refused():
    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    register_network("pair", lambda shape, classes: Pair())
    with pytest.raises(InvalidSetting, match="not tuple"):
        build(NetworkSpec("pair"))


def test_a_factory_must_make_a_new_network_each_time():
    network = small(SHAPE, 4)
    register_network("same", lambda shape, classes: network)
    built = build(NetworkSpec("same"))
    with pytest.raises(InvalidSetting, match="must return a new network at each call"):
        refresh(NetworkSpec("same"), built)


def test_the_check_of_a_factory_keeps_modes_and_statistics():
    def frozen(shape, num_classes):
        network = small(shape, num_classes)
        network[1].eval()
        return network

    register_network("frozen", frozen)
    network = build(NetworkSpec("frozen"))
    assert [part.training for part in network] == [True, False, True, True, True, True]
    assert network[1].num_batches_tracked == 0


def test_bad_sizes_and_devices():
    with pytest.raises(InvalidSetting, match="num_classes = 0"):
        build(NetworkSpec(), num_classes=0)
    with pytest.raises(DeviceUnavailable):
        NetworkSpec().build(SHAPE, 4, generator=seeded(), device="cuda:99")


def test_spec_is_plain_on_disk_and_documented():
    spec = NetworkSpec("convnet", width=64, norm="batch")
    assert from_dict(NetworkSpec, to_dict(spec)) == spec
    assert all(field.doc for field in describe(NetworkSpec))
