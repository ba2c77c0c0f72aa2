import pytest
import torch
from torch import nn

from dsdistill.errors import UnknownName
from dsdistill.networks import ConvNet, reinitialize_, tapped

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
