"""LeNet, AlexNet and VGG-11 against their formulas."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsdistill.errors import InvalidSetting
from dsdistill.networks import VGG11, AlexNet, LeNet, reinitialize_


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(kind, shape, num_classes=3, **options):
    with torch.device("meta"):
        network = kind(shape, num_classes, **options)
    network = network.to_empty(device="cpu")
    reinitialize_(network, seeded())
    return network.double()


def pictures(shape):
    return torch.randn(2, *shape, generator=seeded(1), dtype=torch.float64)


def convolved(block, maps, padding, pool, norm):
    maps = F.conv2d(maps, block.conv.weight, block.conv.bias, padding=padding)
    if norm == "instance":
        maps = F.instance_norm(maps, weight=block.norm.weight, bias=block.norm.bias)
    elif norm == "batch":
        mean, variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
        maps = (maps - mean) / (variance + 1e-5).sqrt()
    maps = maps.clamp(min=0)
    if not pool:
        return maps
    maps = maps[:, :, : maps.shape[2] // 2 * 2, : maps.shape[3] // 2 * 2]
    return maps.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))


@pytest.mark.parametrize(("shape", "first"), [((3, 17, 22), 0), ((1, 28, 28), 2), ((1, 12, 15), 2)])
def test_lenet_equals_its_formula(shape, first):
    network, images = fresh(LeNet, shape), pictures(shape)
    maps = convolved(network.blocks[0], images, first, True, "none")
    maps = convolved(network.blocks[1], maps, 0, True, "none")
    assert (network.blocks[0].conv.kernel_size, maps.shape[1]) == ((5, 5), 16)
    one, two = network.hidden[0], network.hidden[2]
    hidden = (maps.flatten(1) @ one.weight.T + one.bias).clamp(min=0)
    hidden = (hidden @ two.weight.T + two.bias).clamp(min=0)
    assert (one.out_features, hidden.shape) == (120, (2, 84))
    torch.testing.assert_close(network.embed(images), hidden)
    torch.testing.assert_close(network(images), hidden @ network.classifier.weight.T + network.classifier.bias)


@pytest.mark.parametrize(
    ("shape", "norm", "first"), [((3, 9, 17), "none", 2), ((1, 28, 28), "none", 4), ((3, 16, 16), "batch", 2)]
)
def test_alexnet_equals_its_formula(shape, norm, first):
    network, maps = fresh(AlexNet, shape, norm=norm), pictures(shape)
    expected = maps
    paddings, pools = (first, 2, 1, 1, 1), (True, True, False, False, True)
    for block, padding, pool in zip(network.blocks, paddings, pools, strict=True):
        expected = convolved(block, expected, padding, pool, norm)
    torch.testing.assert_close(network.embed(maps), expected.flatten(1))
    assert [block.conv.out_channels for block in network.blocks] == [128, 192, 256, 192, 192]
    assert [block.conv.kernel_size[0] for block in network.blocks] == [5, 5, 3, 3, 3]


@pytest.mark.parametrize(("shape", "first"), [((3, 32, 39), 1), ((1, 28, 28), 3)])
def test_vgg_equals_its_formula(shape, first):
    network, maps = fresh(VGG11, shape), pictures(shape)
    expected = maps
    paddings = (first, 1, 1, 1, 1, 1, 1, 1)
    pools = (True, True, False, True, False, True, False, True)
    for block, padding, pool in zip(network.blocks, paddings, pools, strict=True):
        expected = convolved(block, expected, padding, pool, "instance")
    torch.testing.assert_close(network.embed(maps), expected.flatten(1))
    assert [block.conv.out_channels for block in network.blocks] == [64, 128, 256, 256, 512, 512, 512, 512]


@pytest.mark.parametrize(
    ("kind", "shape", "features"),
    [
        (LeNet, (3, 32, 32), 84),
        (LeNet, (1, 28, 28), 84),
        (AlexNet, (3, 32, 32), 192 * 16),
        (AlexNet, (1, 28, 28), 192 * 16),
        (AlexNet, (3, 64, 40), 192 * 8 * 5),
        (VGG11, (3, 32, 32), 512),
        (VGG11, (1, 28, 28), 512),
        (VGG11, (3, 64, 96), 512 * 2 * 3),
    ],
)
def test_feature_sizes(kind, shape, features):
    with torch.device("meta"):
        network = kind(shape, 10)
        assert network.embed(torch.zeros(5, *shape)).shape == (5, features)
        assert network(torch.zeros(5, *shape)).shape == (5, 10)


@pytest.mark.parametrize(
    ("kind", "channels", "least"),
    [(LeNet, 3, 16), (LeNet, 1, 12), (AlexNet, 3, 8), (AlexNet, 1, 4), (VGG11, 3, 32), (VGG11, 1, 28)],
)
def test_the_least_size_works_and_the_next_smaller_is_refused(kind, channels, least):
    with torch.device("meta"):
        images = torch.zeros(1, channels, least, least + 5)
        assert kind(images.shape[1:], 10)(images).shape == (1, 10)
        for shape in ((channels, least - 1, 64), (channels, 64, least - 1)):
            with pytest.raises(InvalidSetting, match=f"at least {least} x {least}"):
                kind(shape, 10)


def test_alexnet_has_no_norm_by_default_and_vgg_has_instance_norm():
    with torch.device("meta"):
        assert all(isinstance(block.norm, nn.Identity) for block in AlexNet((3, 32, 32), 10).blocks)
        assert all(isinstance(block.norm, nn.GroupNorm) for block in VGG11((3, 32, 32), 10).blocks)
        batch = AlexNet((3, 32, 32), 10, norm="batch")
    assert [type(part) for part in batch.blocks[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert [type(part) for part in batch.blocks[2]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
