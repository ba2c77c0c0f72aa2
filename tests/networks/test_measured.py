"""Distances of batch statistics: the formula by hand, autograd as the slow reference, groups, layers not run."""

import pytest
import torch
from torch import nn

from dsdistill.errors import InvalidSetting
from dsdistill.networks import MeasuredNetwork, NetworkSpec
from dsdistill.networks.measured import group_moments
from dsdistill.networks.small_maps import SmallMapConv

# Channel 0: running mean 0, variance 1; channel 1: 1 and 4. Two values of each channel.
EXACT = torch.tensor([[1.0, -1.0], [-1.0, 3.0]])


def layer(channels=2, **values):
    norm = nn.BatchNorm1d(channels).eval()
    norm.running_mean.copy_(torch.tensor(values.get("mean", [0.0, 1.0])))
    norm.running_var.copy_(torch.tensor(values.get("variance", [1.0, 4.0])))
    return norm


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (EXACT, 0.0),
        (EXACT + torch.tensor([3.0, 0.0]), 3.0),
        (1 + (EXACT - 1) * torch.tensor([1.0, 2.0]), 12.0),
        (torch.tensor([3.0, 0.0]) + torch.tensor([[1.0, -3.0], [-1.0, 5.0]]), 15.0),
    ],
)
def test_the_distance_by_hand(values, expected):
    _, distances = MeasuredNetwork(nn.Sequential(layer()))(values)
    assert distances.shape == (1, 1)
    assert distances.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("moved", [0.0, 3.0])
def test_where_a_norm_is_zero_so_is_its_gradient(moved):
    values = (EXACT + torch.tensor([moved, 0.0])).requires_grad_()
    _, distances = MeasuredNetwork(nn.Sequential(layer()))(values)
    (slope,) = torch.autograd.grad(distances.sum(), values)
    # A shift of channel 0 costs as much in each of the 2 values; the variance stays exact.
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.0]]) if moved else torch.zeros(2, 2)
    torch.testing.assert_close(slope, expected)


def trained(norm="batch", name="convnet", shape=(3, 8, 8), **options):
    spec = NetworkSpec(name, norm=norm, **options)
    network = spec.build(shape, 4, generator=torch.Generator().manual_seed(0), device="cpu").double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # running statistics away from 0 and 1
        network(torch.randn(8, *shape, generator=generator, dtype=torch.float64) * 2 + 1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network.eval()


def by_hooks(network, images):
    """Logits and distances of the layers in order of registration, as the authors' code makes them."""
    found = {}

    def collect(number):
        def hook(module, arguments, result):
            maps = arguments[0].transpose(0, 1).reshape(arguments[0].shape[1], -1)
            mean, variance = maps.mean(1), maps.var(1, unbiased=False)
            found[number] = (variance - module.running_var).norm() + (mean - module.running_mean).norm()

        return hook

    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    handles = [part.register_forward_hook(collect(number)) for number, part in enumerate(norms)]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return logits, torch.stack([found[number] for number in sorted(found)])


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_network_with_the_distances_and_gradients_of_hooks(name, memory_format):
    network = trained(name=name, **({"width": 6, "depth": 2} if name == "convnet" else {}))
    weights = torch.tensor([10.0] + [1.0] * 40, dtype=torch.float64)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images = images.to(memory_format=memory_format).requires_grad_()
    logits, distances = by_hooks(network, images)
    mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits * mix).sum() + distances @ weights[: len(distances)], images)
    measured = MeasuredNetwork(network)
    ours, found = measured(images)
    (slope,) = torch.autograd.grad((ours * mix).sum() + found[0] @ weights[: len(distances)], images)
    assert len(measured.layers) == found.shape[1] == len(distances)
    torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], distances, rtol=1e-12, atol=1e-12)
    assert float((slope - expected).norm() / expected.norm()) < 1e-12


def test_groups_are_runs_of_their_own():
    measured, generator = MeasuredNetwork(trained(width=6, depth=2)), torch.Generator().manual_seed(2)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    logits, distances = measured(images, groups=3)
    (slope,) = torch.autograd.grad((distances.sum(1) * weights).sum() + logits.square().sum(), images)
    for group, weight in enumerate(weights):
        alone = images[2 * group : 2 * group + 2].detach().requires_grad_()
        own, found = measured(alone)
        (expected,) = torch.autograd.grad(found.sum() * weight + own.square().sum(), alone)
        torch.testing.assert_close(found[0], distances[group], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope[2 * group : 2 * group + 2], expected, rtol=1e-12, atol=1e-12)


def test_layers_that_are_never_run_have_no_distance():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = layer(), layer()

        def forward(self, values):
            return self.used(values)

    measured = MeasuredNetwork(Skipping())
    assert measured.layers == ("unused", "used")
    assert measured(EXACT + torch.tensor([3.0, 0.0]))[1].tolist() == [[3.0]]


def test_the_given_network_is_left_alone_and_its_parameters_are_shared():
    network = trained(width=6, depth=2).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measured = MeasuredNetwork(network)
    measured(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(isinstance(part, nn.BatchNorm2d) for name, part in network.named_modules() if name.endswith("norm"))
    assert next(measured.module.parameters()).data_ptr() == next(network.parameters()).data_ptr()


def test_moments_keep_their_digits_far_from_zero():
    maps = 100 + 0.1 * torch.randn(64, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        mean, variance = group_moments(maps.to(memory_format=memory_format), 2)
        exact = maps.double().view(2, 32, 2, -1).transpose(1, 2).flatten(2)
        torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-5, atol=0)
        torch.testing.assert_close(variance.double(), exact.var(2, correction=0), rtol=1e-3, atol=0)


def test_half_precision_maps_are_averaged_in_float32():
    maps = (100 + torch.randn(64, 2, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean, variance = group_moments(maps, 1)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean[0], maps.float().mean((0, 2, 3)), rtol=1e-5, atol=0)


def test_half_precision_maps_are_normalised_as_well_as_by_the_library():
    norm = nn.BatchNorm2d(8).eval()
    norm.running_mean.copy_(torch.linspace(-4, 4, 8))
    noise = torch.randn(16, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    maps = (noise + norm.running_mean[:, None, None]).bfloat16()
    exact = norm(maps.float()).detach()
    ours = MeasuredNetwork(nn.Sequential(norm.requires_grad_(False)))(maps)[0]
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - exact).square().mean().sqrt()) < 0.003


def test_a_network_without_running_statistics_is_refused():
    with pytest.raises(InvalidSetting, match="batch normalisation with running statistics"):
        MeasuredNetwork(trained(norm="instance", width=6, depth=2), "mine")


def test_images_that_are_no_multiple_of_the_groups_are_refused():
    with pytest.raises(InvalidSetting, match="a divisor of the 5 images"):
        MeasuredNetwork(trained(width=6, depth=2))(torch.zeros(5, 3, 8, 8, dtype=torch.float64), groups=2)


@pytest.mark.parametrize(
    "changes", [{"groups": 4}, {"dilation": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_other_convolutions_are_left_as_they_are(changes):
    other = nn.Conv2d(4, 4, 3, **changes)
    hooked = nn.Conv2d(4, 4, 3, padding=1)  # as the library's weight norm, which makes the weight at each call
    hooked.register_forward_pre_hook(lambda module, arguments: None)
    module = MeasuredNetwork(nn.Sequential(other, hooked, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).module
    assert [type(part) for part in module[:3]] == [nn.Conv2d, nn.Conv2d, SmallMapConv]
