import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsdistill.errors import InvalidSetting
from dsdistill.networks import MLP, VGG11, AlexNet, ConvNet, LeNet, Network, ResNet18, ResNet18AP, reinitialize_
from dsdistill.networks.base import InstanceNorm, normalization
from dsdistill.networks.convnet import default_depth

CIFAR = (3, 32, 32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(network: nn.Module, seed: int = 0) -> nn.Module:
    reinitialize_(network, seeded(seed))
    return network


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (lambda: ConvNet(CIFAR, 10), 320_010),
        (lambda: ConvNet((1, 28, 28), 10), 317_706),
        (lambda: ConvNet(CIFAR, 100), 504_420),
        (lambda: ConvNet((3, 64, 64), 200, depth=4), 857_160),
        (lambda: ConvNet((3, 64, 64), 1000, depth=4), 2_496_360),
        (lambda: ConvNet((3, 128, 128), 10, depth=5), 615_690),
        (lambda: ResNet18(CIFAR, 10), 11_173_962),
        (lambda: ResNet18((1, 28, 28), 10), 11_172_810),
        (lambda: ResNet18AP(CIFAR, 10), 11_250_762),
        (lambda: MLP(CIFAR, 10), 411_146),
        (lambda: LeNet(CIFAR, 10), 62_006),
        (lambda: LeNet((1, 28, 28), 10), 61_706),
        (lambda: AlexNet(CIFAR, 10), 1_872_202),
        (lambda: AlexNet((1, 28, 28), 10), 1_865_802),
        (lambda: AlexNet(CIFAR, 10, norm="batch"), 1_872_202 + 2 * (128 + 192 + 256 + 192 + 192)),
        (lambda: VGG11(CIFAR, 10), 9_231_114),
        (lambda: VGG11(CIFAR, 10, norm="batch"), 9_231_114),
        (lambda: VGG11(CIFAR, 10, norm="none"), 9_231_114 - 2 * (64 + 128 + 2 * 256 + 4 * 512)),
        (lambda: VGG11((1, 28, 28), 10), 9_229_962),
    ],
)
def test_parameter_counts_are_the_published_ones(network, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in network().parameters()) == count


def test_one_channel_convnet_pads_28_pixels_to_32():
    assert ConvNet((1, 28, 28), 10, width=128).embed(torch.zeros(2, 1, 28, 28)).shape == (2, 2048)


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "instance", "group"])
@pytest.mark.parametrize("pooling", ["none", "max", "avg"])
@pytest.mark.parametrize("shape", [(3, 12, 9), (1, 7, 10)])
def test_convnet_variants_classify_features(norm, pooling, shape):
    network = fresh(ConvNet(shape, 5, width=8, depth=2, norm=norm, pooling=pooling))
    images = torch.randn(4, *shape, generator=seeded())
    features = network.embed(images)
    assert features.shape == (4, network.classifier.in_features)
    assert torch.equal(network(images), network.classifier(features))
    assert features.std(0).mean() > 0.01


@pytest.mark.parametrize(
    ("activation", "reference"),
    [
        ("sigmoid", torch.sigmoid),
        ("relu", torch.relu),
        ("leaky_relu", lambda x: torch.where(x > 0, x, 0.01 * x)),
        ("swish", lambda x: x * torch.sigmoid(x)),
    ],
)
def test_convnet_equals_its_formula(activation, reference):
    network = fresh(ConvNet((2, 8, 8), 3, width=6, depth=2, activation=activation)).double()
    images = torch.randn(3, 2, 8, 8, generator=seeded(), dtype=torch.float64)
    maps = images
    for block in network.blocks:
        maps = F.conv2d(maps, block.conv.weight, block.conv.bias, padding=1)
        maps = reference(F.instance_norm(maps, weight=block.norm.weight, bias=block.norm.bias))
        maps = maps.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    expected = maps.flatten(1) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(network(images), expected, rtol=1e-12, atol=1e-12)


def test_too_deep_a_convnet_names_the_largest_depth():
    ConvNet((3, 10, 8), 10, width=4, depth=3)
    with pytest.raises(InvalidSetting, match="use depth 3 or less"):
        ConvNet((3, 10, 8), 10, width=4, depth=4)
    with pytest.raises(InvalidSetting, match="use depth 5 or less"):
        ConvNet((1, 28, 28), 10, width=4, depth=6)
    with pytest.raises(InvalidSetting, match="pooling='none'"):
        ConvNet((3, 1, 1), 10, width=4, depth=1)
    assert ConvNet((3, 8, 8), 10, width=4, depth=6, pooling="none").classifier.in_features == 256


@pytest.mark.parametrize(
    ("shape", "depth"),
    [((1, 28, 28), 3), (CIFAR, 3), ((3, 64, 64), 4), ((3, 128, 128), 5), ((3, 4, 4), 2), ((3, 1, 1), 1)],
)
def test_default_depth_follows_the_image_size(shape, depth):
    assert default_depth(shape) == depth


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"norm": "spectral"}, "norm"),
        ({"activation": "tanh"}, "activation"),
        ({"pooling": "sum"}, "pooling"),
        ({"width": 0}, "width"),
        ({"depth": 0}, "depth"),
        ({"width": 6, "norm": "group"}, "width"),
        ({"shape": (3, 0, 8)}, "shape"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_convnet_refuses_bad_settings(arguments, setting):
    with pytest.raises(InvalidSetting) as error:
        ConvNet(**{"shape": (3, 8, 8), "num_classes": 2, **arguments})
    assert error.value.setting == setting


def test_mlp_refuses_no_units():
    with pytest.raises(InvalidSetting, match="width = 0"):
        MLP(CIFAR, 10, width=0)


def test_mlp_equals_its_formula():
    network = fresh(MLP((1, 3, 4), 2, width=5))
    images = torch.randn(3, 1, 3, 4, generator=seeded())
    first, second = network.hidden[0], network.hidden[2]
    hidden = (images.reshape(3, 12) @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    torch.testing.assert_close(network.embed(images), hidden)
    torch.testing.assert_close(network(images), hidden @ network.classifier.weight.T + network.classifier.bias)


def test_resnet_pools_a_4x4_map_of_32_pixels():
    with torch.device("meta"):
        network = ResNet18(CIFAR, 10)
    network = fresh(network.to_empty(device="cpu")).requires_grad_(False)
    images = torch.randn(2, *CIFAR, generator=seeded())
    maps = network.stages(network.stem(images))
    assert maps.shape == (2, 512, 4, 4)
    torch.testing.assert_close(network.embed(images), F.avg_pool2d(maps, 4).flatten(1))


@pytest.mark.parametrize(("shape", "norm"), [((1, 8, 8), "instance"), ((3, 9, 13), "layer"), ((3, 8, 8), "batch")])
def test_resnet_features_depend_on_small_images(shape, norm):
    with torch.device("meta"):
        network = ResNet18(shape, 10, norm=norm)
    network = fresh(network.to_empty(device="cpu")).requires_grad_(False)
    features = network.embed(torch.randn(3, *shape, generator=seeded()))
    assert features.shape == (3, 512)
    assert features.std(0).mean() > 1e-3


def test_resnet_refuses_images_below_8_pixels():
    with pytest.raises(InvalidSetting, match="at least 8 x 8"):
        ResNet18((3, 7, 32), 10)


def test_initialisation_is_uniform_within_one_over_root_fan_in():
    network = fresh(ConvNet(CIFAR, 10))
    first, second = network.blocks[0].conv, network.blocks[1].conv
    for layer, fan_in in ((first, 27), (second, 1152), (network.classifier, 2048)):
        bound = 1 / math.sqrt(fan_in)
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound * (1 + 1e-6)
            assert parameter.abs().max() > 0.7 * bound
            assert abs(parameter.mean()) < 4 * bound / math.sqrt(3 * parameter.numel())
    assert first.weight.std().item() == pytest.approx(0.1111, rel=0.02)
    assert 1 / math.sqrt(1152) == pytest.approx(0.02946, abs=1e-5)
    assert torch.equal(network.blocks[0].norm.weight, torch.ones(128))
    assert torch.equal(network.blocks[0].norm.bias, torch.zeros(128))


def test_instance_is_instance_norm_with_affine_weights():
    norm = normalization("instance", 16, 8, 8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=seeded(1))
        norm.bias.normal_(generator=seeded(2))
    maps = torch.randn(4, 16, 8, 8, generator=seeded(3))
    expected = F.instance_norm(maps, weight=norm.weight, bias=norm.bias)
    assert (norm(maps) - expected).abs().max() < 1e-6


def test_conv_bias_before_instance_norm_has_no_gradient():
    network = fresh(ConvNet((3, 16, 16), 10, width=16)).double()
    images = torch.randn(4, 3, 16, 16, generator=seeded(), dtype=torch.float64)
    F.cross_entropy(network(images), torch.arange(4)).backward()
    for block in network.blocks:
        assert block.conv.bias.grad.abs().max() < 1e-12
        assert block.conv.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (32, 32)])
def test_instance_norm_equals_the_library_with_both_derivatives(memory_format, size):
    def derivatives(norm):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
        images = torch.randn(3, 5, *size, generator=seeded(), dtype=torch.float64)
        images = images.to(memory_format=memory_format).requires_grad_()
        normal = norm.double()(images)
        inputs = (images, norm.weight, norm.bias)
        first = torch.autograd.grad(normal.pow(3).sum(), inputs, create_graph=True)
        (second,) = torch.autograd.grad(first[0].square().sum(), images)
        return normal, *first, second

    for ours, theirs in zip(derivatives(InstanceNorm(5)), derivatives(nn.GroupNorm(5, 5)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_instance_norm_leaves_mixed_precision_to_the_library():
    maps = torch.randn(2, 4, 6, 6, generator=seeded()).to(torch.bfloat16, memory_format=torch.channels_last)
    ours, theirs = InstanceNorm(4), nn.GroupNorm(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(maps), theirs(maps))


def test_network_leaves_embed_to_its_subclasses():
    with pytest.raises(TypeError, match="embed"):
        Network()
