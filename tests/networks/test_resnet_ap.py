import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsdistill.errors import InvalidSetting
from dsdistill.networks import ResNet18AP, ResNetAP10, parameter_digest, reinitialize_
from dsdistill.networks.base import FanOutConv2d
from dsdistill.networks.resnet_ap import PooledBlock


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(kind, shape, num_classes=10, **options):
    with torch.device("meta"):
        network = kind(shape, num_classes, **options)
    network = network.to_empty(device="cpu")
    reinitialize_(network, seeded())
    return network


@pytest.mark.parametrize("halve", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (4, 4)])
def test_a_block_equals_its_formula(inputs, outputs, halve):
    block = PooledBlock(inputs, outputs, "instance", (9, 6), halve=halve).double()
    images = torch.randn(2, inputs, 9, 6, generator=seeded(), dtype=torch.float64)

    def normal(maps, norm):
        return F.instance_norm(maps, weight=norm.weight, bias=norm.bias)

    def halved(maps):
        return maps[:, :, :8].unflatten(2, (4, 2)).unflatten(4, (3, 2)).mean((3, 5)) if halve else maps

    inner = halved(normal(F.conv2d(images, block.conv1.weight, padding=1), block.norm1).clamp(min=0))
    inner = normal(F.conv2d(inner, block.conv2.weight, padding=1), block.norm2)
    shortcut = images
    if inputs != outputs or halve:
        shortcut = normal(halved(F.conv2d(images, block.shortcut.conv.weight)), block.shortcut.norm)
    torch.testing.assert_close(block(images), (inner + shortcut).clamp(min=0))


def test_resnet18_ap_flattens_a_4x4_map_of_32_pixels():
    with torch.device("meta"):
        images = torch.zeros(2, 3, 32, 32)
        network = ResNet18AP((3, 32, 32), 10)
        assert network.stages(network.stem(images)).shape == (2, 512, 4, 4)
        assert network.embed(images).shape == (2, 512 * 16)
        assert network(images).shape == (2, 10)
        assert ResNet18AP((1, 28, 28), 10).classifier.in_features == 512 * 9
    convs = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert all(conv.stride == (1, 1) for conv in convs)
    assert all(conv.bias is None for conv in convs)
    assert len(convs) == 20
    assert not any(isinstance(conv, FanOutConv2d) for conv in convs)


def stem_parameters(kernel, channels=3):
    return 64 * channels * kernel * kernel + 128


def block_parameters(inputs, outputs):
    shortcut = inputs * outputs + 2 * outputs if inputs != outputs else 0
    return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs + shortcut


@pytest.mark.parametrize(
    ("shape", "kernel", "pool"),
    [
        ((3, 32, 32), 3, 1),
        ((1, 28, 28), 3, 1),
        ((3, 64, 48), 3, 1),
        ((3, 65, 64), 3, 2),
        ((3, 128, 128), 3, 2),
        ((3, 32, 129), 7, 4),
        ((3, 224, 224), 7, 4),
    ],
)
def test_resnet_ap10_parameters_and_stem_by_size(shape, kernel, pool):
    with torch.device("meta"):
        network = ResNetAP10(shape, 7)
        images = torch.zeros(2, *shape)
        assert network.stem(images).shape == (2, 64, shape[1] // pool, shape[2] // pool)
        assert network.embed(images).shape == (2, 512)
        assert network(images).shape == (2, 7)
    blocks = [(64, 64), (64, 128), (128, 256), (256, 512)]
    count = stem_parameters(kernel, shape[0]) + sum(block_parameters(*sizes) for sizes in blocks) + 513 * 7
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_resnet_ap10_means_its_last_map():
    network = fresh(ResNetAP10, (3, 12, 16)).requires_grad_(False)
    images = torch.randn(2, 3, 12, 16, generator=seeded(1))
    maps = network.stages(network.stem(images))
    torch.testing.assert_close(network.embed(images), maps.flatten(2).mean(2))


def test_resnet_ap10_draws_its_convolutions_from_normal_distributions():
    network = fresh(ResNetAP10, (3, 32, 32))
    convs = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert len(convs) == 12
    for conv in convs:
        std = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        values = conv.weight.flatten() / std
        error = values.numel() ** -0.5
        assert abs(values.mean()) < 4 * error
        assert values.std().item() == pytest.approx(1, abs=4 * error)
        assert values.pow(4).mean().item() == pytest.approx(3, abs=40 * error), "not normal"
    linear = network.classifier.weight
    assert linear.abs().max() <= 512**-0.5
    assert linear.std().item() == pytest.approx(512**-0.5 / 3**0.5, rel=0.05)


def test_a_used_network_becomes_the_same_as_a_new_one():
    network = fresh(ResNetAP10, (3, 8, 8))
    digest = parameter_digest(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    reinitialize_(network, seeded())
    assert parameter_digest(network) == digest
    reinitialize_(network, seeded(1))
    assert parameter_digest(network) != digest


def test_biases_only_where_nothing_normalises():
    for norm in ("none", "instance", "batch"):
        with torch.device("meta"):
            network = ResNetAP10((3, 32, 32), 10, norm=norm)
        convs = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
        assert all((conv.bias is not None) == (norm == "none") for conv in convs)
    network = fresh(ResNetAP10, (3, 8, 8), norm="none")
    bias = network.stages[0][0].conv1.bias
    assert 0.5 / 24 < bias.abs().max() <= 1 / 24


def test_a_new_layer_is_drawn_like_a_refilled_one():
    layer = FanOutConv2d(8, 500, 3)
    std = (2 / (9 * 500)) ** 0.5
    assert layer.weight_std == pytest.approx(std)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("kind", [ResNet18AP, ResNetAP10])
@pytest.mark.parametrize(("shape", "norm"), [((1, 8, 8), "instance"), ((3, 9, 13), "layer"), ((3, 8, 40), "group")])
def test_features_depend_on_small_images(kind, shape, norm):
    network = fresh(kind, shape, norm=norm).requires_grad_(False)
    features = network.embed(torch.randn(3, *shape, generator=seeded()))
    assert features.shape == (3, network.classifier.in_features)
    assert features.std(0).mean() > 1e-3


@pytest.mark.parametrize(
    ("kind", "shape", "least"),
    [
        (ResNet18AP, (3, 7, 32), 8),
        (ResNetAP10, (3, 7, 32), 8),
        (ResNetAP10, (3, 15, 100), 16),
        (ResNetAP10, (3, 200, 31), 32),
    ],
)
def test_images_that_would_vanish_are_refused(kind, shape, least):
    with pytest.raises(InvalidSetting, match=f"at least {least} x {least}"):
        kind(shape, 10)
