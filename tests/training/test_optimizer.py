import pytest
import torch
from torch import nn

from dsdistill.errors import InvalidSetting
from dsdistill.networks import NetworkSpec
from dsdistill.training import TrainingRecipe, make_optimizer
from dsdistill.training.optimizer import set_rate

CPU = torch.device("cpu")


def network():
    spec = NetworkSpec(width=4, depth=1, norm="batch")
    return spec.build((3, 4, 6), 3, generator=torch.Generator().manual_seed(0), device="cpu")


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_the_optimiser_is_the_one_named(name, kind):
    recipe = TrainingRecipe(optimizer=name, lr=0.3, weight_decay=0.02)
    optimizer = make_optimizer(list(network().parameters()), recipe, CPU)
    assert type(optimizer) is kind
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.02)]
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0.9


def test_adam_decays_by_its_gradient():
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = make_optimizer([weight], TrainingRecipe(optimizer="adam", lr=0.1, weight_decay=0.5), CPU)
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == pytest.approx([1.9, -0.9], abs=1e-6)  # a step of lr, whatever the size of the decay


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_only_weights_decay(name):
    net = network()
    recipe = TrainingRecipe(optimizer=name, lr=0.1, weight_decay=0.5, decay_only_weights=True)
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    optimizer = make_optimizer(dict(net.named_parameters()), recipe, CPU)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {key for key, value in net.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {"classifier.weight", *(key for key in before if "conv" in key and key.endswith("weight"))}
    assert len(moved) == 2
    assert any(value.dim() == 1 and "weight" in key for key, value in before.items())  # the scales of the norms


def test_stacked_parameters_are_judged_without_their_first_dimension():
    stacked = {"weight": torch.ones(3, 4, 5), "norm.weight": torch.ones(3, 4), "scale": torch.ones(3, 4, 5)}
    recipe = TrainingRecipe(decay_only_weights=True, weight_decay=0.1)
    groups = make_optimizer(stacked, recipe, CPU, stacked=True).param_groups
    assert [[tuple(one.shape) for one in group["params"]] for group in groups] == [[(3, 4, 5)], [(3, 4), (3, 4, 5)]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_parameters_without_names_cannot_be_told_apart():
    with pytest.raises(InvalidSetting, match=r"decay_only_weights.*named_parameters"):
        make_optimizer(list(network().parameters()), TrainingRecipe(decay_only_weights=True), CPU)


def test_a_rate_is_that_of_all_parameters():
    recipe = TrainingRecipe(decay_only_weights=True)
    optimizer = make_optimizer(dict(network().named_parameters()), recipe, CPU)
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
