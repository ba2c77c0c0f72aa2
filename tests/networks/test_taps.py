import pytest
import torch
from torch import nn

from dsdistill.errors import UnknownName
from dsdistill.networks import ConvNet, activation_taps, reinitialize_, tapped
from dsdistill.networks.spec import BUILTIN

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    network = ConvNet((3, 8, 8), 4, width=4, depth=2)
    reinitialize_(network, torch.Generator().manual_seed(1))
    return network


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def test_maps_after_activations_are_the_inner_tensors(network):
    with tapped(network, lambda name, module: isinstance(module, nn.ReLU)) as maps:
        features = network.embed(IMAGES)
        assert list(maps) == ["blocks.0.act", "blocks.1.act"]
        assert torch.equal(network.blocks[1].pool(maps["blocks.1.act"]).flatten(1), features)
        gradient = torch.autograd.grad(features.sum(), maps["blocks.0.act"])[0]
        assert gradient.shape == (2, 4, 8, 8)
        first = maps["blocks.0.act"]
        network(2 * IMAGES + 1)
        assert maps["blocks.0.act"] is not first
    assert hooks(network) == 0


def test_inputs_instead_of_results(network):
    with tapped(network, ["classifier"], inputs=True) as maps:
        network(IMAGES)
    assert torch.equal(maps["classifier"], network.embed(IMAGES))


def test_one_name_may_stand_alone(network):
    with tapped(network, "blocks.0") as maps:
        network(IMAGES)
    assert maps["blocks.0"].shape == (2, 4, 4, 4)


def test_hooks_go_even_after_an_error(network):
    counted = []
    with pytest.raises(ZeroDivisionError), tapped(network, ["classifier"]):
        counted.append(hooks(network) / len(counted))
    with tapped(network, ["classifier"]):
        assert hooks(network) == 1
    assert hooks(network) == 0


def test_unknown_module_is_named_and_nothing_is_hooked(network):
    with (
        pytest.raises(UnknownName, match=r"did you mean 'blocks\.0\.act'"),
        tapped(network, ["classifier", "blocks.0.akt"]),
    ):
        pass
    assert hooks(network) == 0


@pytest.mark.parametrize("name", BUILTIN)
def test_taps_of_our_networks_are_all_activations_of_maps_in_order_of_execution(name):
    shape = (3, 32, 32)
    with torch.device("meta"):
        network = BUILTIN[name](shape, 4)
    taps = activation_taps(network, shape)
    with tapped(network, lambda _, part: isinstance(part, nn.ReLU)) as found:
        network(torch.zeros(2, *shape, device="meta"))
    assert taps == tuple(name for name, maps in found.items() if maps.dim() == 4)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("convnet", [(128, 32), (128, 16), (128, 8)]),
        ("mlp", []),
        ("lenet", [(6, 28), (16, 10)]),
        ("alexnet", [(128, 32), (192, 16), (256, 8), (192, 8), (192, 8)]),
        ("vgg11", [(64, 32), (128, 16), (256, 8), (256, 8), (512, 4), (512, 4), (512, 2), (512, 2)]),
        ("resnet18", [(64, 32)] * 5 + [(128, 16)] * 4 + [(256, 8)] * 4 + [(512, 4)] * 4),
        (
            "resnet18_ap",
            [*[(64, 32)] * 5, (128, 32), *[(128, 16)] * 3, (256, 16), *[(256, 8)] * 3, (512, 8), *[(512, 4)] * 3],
        ),
        ("resnet_ap10", [*[(64, 32)] * 3, (128, 32), (128, 16), (256, 16), (256, 8), (512, 8), (512, 4)]),
    ],
)
def test_tapped_maps_are_those_before_pooling(name, shapes):
    shape = (3, 32, 32)
    with torch.device("meta"):
        network = BUILTIN[name](shape, 4)
    with tapped(network, activation_taps(network, shape)) as maps:
        network(torch.zeros(2, *shape, device="meta"))
    assert [tuple(tensor.shape) for tensor in maps.values()] == [(2, width, size, size) for width, size in shapes]


class Foreign(nn.Module):
    """Declared out of order; with gates of one pixel, channels-last activations and a shared activation."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.GELU(), nn.SiLU()
        self.gate, self.inner, self.unused = nn.Sigmoid(), nn.ReLU(), nn.ReLU()
        self.squeeze, self.mix = nn.Conv2d(4, 4, 1), nn.Linear(4, 9)
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, images):
        maps = self.first(self.norm(self.stem(images)))
        maps = maps * self.gate(self.squeeze(maps.mean((2, 3), keepdim=True)))
        mixed = self.inner(self.mix(maps.permute(0, 2, 3, 1))).mean(3)
        return self.head(self.last(self.body(maps + mixed[:, None])).mean((2, 3)))


def test_taps_of_other_networks_are_found_by_running_them():
    network = Foreign()
    network.head.eval()
    assert activation_taps(network, (3, 8, 8)) == ("first", "last")
    assert hooks(network) == 0
    assert network.norm.num_batches_tracked == 0
    assert (network.training, network.norm.training, network.head.training) == (True, True, False)


def test_a_network_without_activations_has_no_taps():
    assert activation_taps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (3, 8, 8)) == ()
