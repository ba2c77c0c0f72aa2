import copy

import pytest
import torch
from torch import nn

from dsdistill.errors import InvalidSetting
from dsdistill.networks import ConvNet, ResNet18, embed, has_batchnorm, parameter_digest, reinitialize_


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_used_network_becomes_the_same_as_a_new_one():
    network = ConvNet((3, 8, 8), 4, width=8, depth=2, norm="batch")
    reinitialize_(network, seeded(5))
    first, digest = copy.deepcopy(network.state_dict()), parameter_digest(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    network(torch.randn(4, 3, 8, 8))
    assert parameter_digest(network) != digest
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    reinitialize_(network, seeded(5))
    assert parameter_digest(network) == digest
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())
    assert [parameter.data_ptr() for parameter in network.parameters()] == addresses
    reinitialize_(network, seeded(6))
    assert parameter_digest(network) != digest


def test_values_depend_on_neither_memory_format_nor_precision():
    plain, other = ConvNet((3, 8, 8), 4, width=8, depth=2), ConvNet((3, 8, 8), 4, width=8, depth=2)
    other = other.double().to(memory_format=torch.channels_last)
    reinitialize_(plain, seeded())
    reinitialize_(other, seeded())
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.double(), two)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    network = ConvNet.__new__(ConvNet)
    with torch.device("meta"):
        network.__init__((3, 8, 8), 4, width=8, depth=2)
    reinitialize_(network.to_empty(device="cpu"), seeded())
    assert torch.equal(torch.get_rng_state(), before)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))


def test_unknown_parameters_are_refused_before_anything_changes():
    network = nn.Sequential(nn.Linear(2, 2), Scaled())
    digest = parameter_digest(network)
    with pytest.raises(TypeError, match=r"re-initialise 1 \(Scaled\)"):
        reinitialize_(network, seeded())
    assert parameter_digest(network) == digest


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.BatchNorm1d(6, affine=False), nn.GroupNorm(2, 6, affine=False)])
def test_norms_with_and_without_weights(norm):
    network = nn.Sequential(nn.Linear(4, 6, bias=False), norm)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            tensor.add_(3)
    reinitialize_(network, seeded())
    expected = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, torch.full_like(tensor, expected[name]))


def test_embed_asks_our_networks_and_taps_others():
    network = ConvNet((3, 8, 8), 4, width=8, depth=2)
    images = torch.randn(2, 3, 8, 8, generator=seeded())
    assert torch.equal(embed(network, images), network.embed(images))
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 4))
    assert torch.equal(embed(foreign, images), foreign[:3](images))
    assert not any(module._forward_hooks for module in foreign.modules())


def test_a_submodule_named_embed_is_not_the_method():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)  # declared first, run last
            self.embed = nn.Linear(3, 4)

        def forward(self, images):
            return self.head(self.embed(images.mean((2, 3))))

    network, images = Tokens(), torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(embed(network, images), network.embed(images.mean((2, 3))))


def test_embed_without_a_linear_layer_says_what_is_missing():
    with pytest.raises(InvalidSetting, match=r"torch\.nn\.Linear"):
        embed(nn.Flatten(), torch.zeros(1, 3, 2, 2))


def test_batchnorm_is_found_where_it_is():
    with torch.device("meta"):
        assert has_batchnorm(ResNet18((3, 32, 32), 10, norm="batch"))
        assert not has_batchnorm(ResNet18((3, 32, 32), 10))


def test_digest_sees_names_shapes_and_buffers():
    def digest(tensor, name="value"):
        module = nn.Module()
        module.register_buffer(name, tensor)
        return parameter_digest(module)

    base = digest(torch.zeros(4))
    assert base == digest(torch.zeros(4))
    others = [digest(torch.zeros(2, 2)), digest(torch.zeros(4), "other"), digest(torch.zeros(2, dtype=torch.float64))]
    others += [digest(-torch.zeros(4)), digest(torch.zeros(8, dtype=torch.bfloat16)), digest(torch.tensor(0.0))]
    assert len({base, *others}) == 7
