"""A user's own module and optimiser, differentiated: against training with torch.optim and finite differences."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.networks import FlatNetwork, Outer, Student, backpropagate, unroll
from dsdistill.networks.inner_loop import _import_higher
from dsdistill.networks.rules import SGD

STEPS, RATE = 4, 0.07


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, TARGETS = draws(4, 2, 4, 4, seed=1), torch.tensor([0, 1, 2, 0])
REAL, ANSWERS = draws(5, 2, 4, 4, seed=2), torch.tensor([2, 1, 0, 1, 2])


def filled(network):
    """Seeded parameters in float64; scales of norms near 1."""
    network = network.double()
    with torch.no_grad():
        for place, (name, parameter) in enumerate(network.named_parameters()):
            near = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(near + 0.3 * draws(*parameter.shape, seed=10 + place))
    return network


def network_with(norm):
    # No bias before the norm, which would take it out: Adam makes steps of the rounding of its gradient.
    first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    return filled(nn.Sequential(first, norm, nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)))


def smooth():
    return network_with(nn.GroupNorm(2, 4))


def batch(images, step):
    return torch.roll(images, step, -1)[step % 2 :], TARGETS[step % 2 :]


def losses_of(images):
    def made(step):
        shown, wanted = batch(images, step)
        return lambda network: cross_entropy(network(shown), wanted)

    return [made(step) for step in range(STEPS)]


def examined(module, parameters):
    return cross_entropy(functional_call(module, parameters, (REAL,)), ANSWERS)


def trained(module, kind, options, images=IMAGES, lr=RATE, state=None):
    """The parameters after training a copy with torch."""
    module = copy.deepcopy(module)
    optimizer = kind(module.parameters(), lr=lr, **options)
    if state:
        optimizer.load_state_dict(state)
    for loss in losses_of(images):
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def differences(module, kind, options, step=1e-5):
    """The derivative of the examination along a direction of the images, and in the step size."""
    along = draws(*IMAGES.shape, seed=3)

    def slope(ahead, behind):
        with torch.no_grad():
            return float(examined(module, ahead) - examined(module, behind)) / (2 * step)

    of_images = slope(*(trained(module, kind, options, IMAGES + sign * step * along) for sign in (1, -1)))
    of_rate = slope(*(trained(module, kind, options, lr=RATE + sign * step) for sign in (1, -1)))
    return of_images, of_rate


def slopes(module, parameters, images, lr):
    of_images, of_rate = torch.autograd.grad(examined(module, parameters), (images, lr))
    return float((of_images * draws(*IMAGES.shape, seed=3)).sum()), float(of_rate)


def leaves():
    return IMAGES.clone().requires_grad_(), torch.tensor(RATE, dtype=torch.float64, requires_grad=True)


def assert_near(found, expected, tolerance=1e-12):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].detach(), tensor, rtol=tolerance, atol=tolerance)


SGDS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True},
]
ADAMS = [
    (torch.optim.Adam, {"eps": 1e-3}),
    (torch.optim.Adam, {"betas": (0.6, 0.9), "weight_decay": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
]
EVERY = [(torch.optim.SGD, options) for options in SGDS] + ADAMS


@pytest.mark.parametrize(("kind", "options"), EVERY, ids=str)
def test_it_trains_as_torch_does_and_its_derivatives_are_those_of_finite_differences(kind, options):
    module, (images, lr) = smooth(), leaves()
    found = unroll(module, kind(module.parameters(), lr=1.0, **options), losses_of(images), lr=lr)
    assert_near(found, trained(module, kind, options))
    assert slopes(module, found, images, lr) == pytest.approx(differences(module, kind, options), rel=1e-5)


@pytest.mark.parametrize("options", SGDS, ids=str)
def test_sgd_equals_the_unroll_of_this_package(options):
    module, (images, lr) = smooth(), leaves()
    found = unroll(module, torch.optim.SGD(module.parameters(), **options), losses_of(images), lr=lr)
    expected = torch.autograd.grad(examined(module, found), (images, lr))
    shown, rate = leaves()
    flat = FlatNetwork(module)
    student = Student(flat, lambda step, images, _: batch(images, step), STEPS, SGD(**options))
    outer = Outer(lambda states: cross_entropy(flat(states[0], REAL), ANSWERS), (STEPS,))
    end = backpropagate(student, outer, flat.vector(), rate, shown, TARGETS, "unroll").end
    torch.testing.assert_close(torch.cat([tensor.flatten() for tensor in found.values()]), end, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip((shown.grad, rate.grad), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_adam_of_higher_itself_is_wrong():
    kind, options = ADAMS[0]
    module, (images, lr) = smooth(), leaves()
    optimizer = kind(module.parameters(), **options)
    with _import_higher().innerloop_ctx(module, optimizer, override={"lr": [lr]}) as (network, steps):
        for loss in losses_of(images):
            steps.step(loss(network))
        found = dict(zip(dict(module.named_parameters()), network.parameters(), strict=True))
    expected = trained(module, kind, options)
    assert max(float((found[name] - tensor).detach().abs().max()) for name, tensor in expected.items()) > 1e-3
    assert slopes(module, found, images, lr)[0] != pytest.approx(differences(module, kind, options)[0], rel=0.1)


def test_the_first_import_of_higher_is_silent(monkeypatch, tmp_path):
    """It is compiled then, which warns; warnings are errors here."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "higher"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    assert callable(_import_higher().innerloop_ctx)


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}), *ADAMS[:1], *ADAMS[3:]], ids=str
)
def test_an_optimiser_goes_on_from_where_it_is_and_nothing_is_changed(kind, options):
    module = network_with(nn.BatchNorm2d(4))
    optimizer = kind(module.parameters(), lr=RATE, **options)
    for loss in losses_of(REAL[:4])[:2]:
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    seen = torch.get_rng_state()
    images = IMAGES.clone().requires_grad_()
    found = unroll(module, optimizer, losses_of(images))
    assert_near(found, trained(module, kind, options, state=copy.deepcopy(before[1])))
    examined(copy.deepcopy(module), found).backward()
    assert images.grad.any()
    torch.testing.assert_close((module.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), seen)


@pytest.mark.parametrize(("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9}), ADAMS[0]], ids=str)
def test_batch_statistics_of_training_mode_are_differentiated(kind, options):
    module, (images, lr) = network_with(nn.BatchNorm2d(4)), leaves()
    found = unroll(module, kind(module.parameters(), **options), losses_of(images), lr=lr)
    assert_near(found, trained(module, kind, options))
    expected = differences(copy.deepcopy(module), kind, options)
    assert slopes(copy.deepcopy(module), found, images, lr) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_groups_have_step_sizes_of_their_own(kind):
    def optimised(module):
        weights, rest = module[0].weight, [module[5].weight, module[5].bias]
        return kind([{"params": rest, "weight_decay": 0.1}, {"params": [weights], "lr": 0.02}])

    module, reference = smooth(), smooth()
    optimizer = optimised(reference)
    for group, rate in zip(optimizer.param_groups, (0.05, 0.01), strict=True):
        group["lr"] = rate
    for loss in losses_of(IMAGES):
        optimizer.zero_grad()
        loss(reference).backward()
        optimizer.step()
    rates = torch.tensor([0.05, 0.01], dtype=torch.float64, requires_grad=True)
    expected = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    found = unroll(module, optimised(module), losses_of(IMAGES), lr=rates)
    assert_near(found, expected)
    assert torch.equal(found["1.weight"], module[1].weight)  # in no group
    (slope,) = torch.autograd.grad(examined(module, found), rates)
    assert slope.all()
    same = unroll(module, optimised(module), losses_of(IMAGES), lr=rates[0])
    (slope,) = torch.autograd.grad(examined(module, same), rates)
    assert (slope != 0).tolist() == [True, False]
    with pytest.raises(ShapeMismatch, match=r"lr has shape \(3,\), expected \(\) or \(2,\)"):
        unroll(module, optimised(module), losses_of(IMAGES), lr=torch.ones(3))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_size_of_the_optimiser_that_is_learned_is_differentiated(kind):
    module, (_, lr) = smooth(), leaves()
    found = unroll(module, kind(module.parameters(), lr=lr), losses_of(IMAGES))
    (slope,) = torch.autograd.grad(examined(module, found), lr)
    assert float(slope) == pytest.approx(differences(module, kind, {})[1], rel=1e-5)


class Partial(nn.Module):
    """One layer is fixed, one is never run."""

    def __init__(self):
        super().__init__()
        self.fixed, self.used, self.idle = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, rows):
        return self.used(self.fixed(rows))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_frozen_and_unused_parameters_stay(kind):
    module, rows = filled(Partial()), draws(4, 4)
    losses = [lambda network: cross_entropy(network(rows), TARGETS)] * 3
    found = unroll(module, kind(module.parameters(), lr=RATE, weight_decay=0.1), losses)
    moved = {name for name, tensor in found.items() if not torch.equal(tensor, module.get_parameter(name))}
    assert moved == {"used.weight", "used.bias"}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_each_loss_is_asked_for_when_its_turn_has_come(kind):
    module, told = smooth(), []

    def losses():
        for step in range(3):
            told.append(step)
            yield lambda network: told.append("called") or cross_entropy(network(IMAGES), TARGETS)

    unroll(module, kind(module.parameters(), lr=RATE), losses())
    assert told == [0, "called", 1, "called", 2, "called"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_no_step_leaves_the_parameters(kind):
    module = smooth()
    found = unroll(module, kind(module.parameters(), lr=RATE), [])
    assert_near(found, {name: parameter.detach() for name, parameter in module.named_parameters()}, 0)
    assert all(found[name] is not parameter for name, parameter in module.named_parameters())


class Attentive(nn.Module):
    """Pixels attend to each other on the kernel that torch chooses, which is a fused one."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(2, 6), nn.Linear(2, 3)

    def forward(self, images):
        query, key, value = self.mix(images.flatten(2).mT).chunk(3, -1)
        pixels = nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
        return self.head(pixels.mean((1, 2)))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_attention_is_differentiated_twice(kind):
    module, (images, lr) = filled(Attentive()), leaves()
    options = {"eps": 1e-3} if kind is torch.optim.Adam else {}
    found = unroll(module, kind(module.parameters(), **options), losses_of(images), lr=lr)
    assert slopes(module, found, images, lr) == pytest.approx(differences(module, kind, options), rel=1e-5)


class OwnSGD(torch.optim.SGD):
    """Might step in any way."""


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (torch.optim.SGD, {"maximize": True}, r"param_groups\[0\].maximize = True is not valid: minimise the negative"),
        (torch.optim.AdamW, {"maximize": True}, "maximize"),
        (torch.optim.Adam, {"amsgrad": True}, r"param_groups\[0\].amsgrad"),
        (torch.optim.RMSprop, {}, "optimizer = 'RMSprop' is not valid: torch.optim's SGD, Adam, AdamW"),
        (torch.optim.NAdam, {}, "NAdam"),
        (OwnSGD, {}, "OwnSGD"),
    ],
)
def test_optimisers_that_it_cannot_follow_are_refused(kind, options, message):
    module = smooth()
    with pytest.raises(InvalidSetting, match=message):
        unroll(module, kind(module.parameters(), lr=RATE, **options), losses_of(IMAGES))


def test_an_optimiser_of_another_module_is_refused():
    module, other = smooth(), smooth()
    optimizer = torch.optim.SGD([module[0].weight, other[0].weight], lr=RATE)
    with pytest.raises(InvalidSetting, match=r"params\[1\] = \(4, 2, 3, 3\) is not valid: not a parameter of the mod"):
        unroll(module, optimizer, losses_of(IMAGES))


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_modules_are_refused(how):
    module = smooth()
    given = torch.compile(module, backend="eager") if how == "wrapped" else module
    if how == "in place":
        module.compile(backend="eager")
    elif how == "a part":
        module[0] = torch.compile(module[0], backend="eager")
    with pytest.raises(InvalidSetting, match="uncompiled"):
        unroll(given, torch.optim.SGD(given.parameters(), lr=RATE), losses_of(IMAGES))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_that_calls_the_module_instead_is_refused(kind):
    module = smooth()
    losses = [lambda network: cross_entropy(module(IMAGES), TARGETS)]
    with pytest.raises(InvalidSetting, match="each must call the function that it is given"):
        unroll(module, kind(module.parameters(), lr=RATE), losses)
