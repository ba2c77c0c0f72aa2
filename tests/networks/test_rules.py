"""Rules against torch.optim, against finite differences, and on a scalar by hand."""

import pytest
import torch

from dsdistill.errors import InvalidSetting
from dsdistill.networks.rules import SGD, Adam

CASES = [
    (SGD(), torch.optim.SGD, {}),
    (SGD(weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (
        SGD(momentum=0.9, dampening=0.3, weight_decay=0.1),
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    ),
    (
        SGD(momentum=0.7, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
    ),
    (Adam(), torch.optim.Adam, {}),
    (
        Adam(betas=(0.6, 0.8), eps=0.1, weight_decay=0.2),
        torch.optim.Adam,
        {"betas": (0.6, 0.8), "eps": 0.1, "weight_decay": 0.2},
    ),
    (Adam(weight_decay=0.2, decoupled=True), torch.optim.AdamW, {"weight_decay": 0.2}),
]
RULES = [rule for rule, _, _ in CASES]


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rule", "kind", "options"), CASES, ids=str)
def test_steps_are_those_of_torch(rule, kind, options):
    rate, gradients = 0.07, draws(6, 3, 4, seed=1)
    theirs = torch.nn.Parameter(draws(3, 4))
    optimizer = kind([theirs], lr=rate, **options)
    ours, moments = theirs.detach().clone(), rule.start(theirs.detach())
    for number, gradient in enumerate(gradients):
        theirs.grad = gradient.clone()
        optimizer.step()
        ours, moments = rule.step(ours, gradient, moments, torch.tensor(rate, dtype=torch.float64), number)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_can_be_differentiated_in_everything(rule, number):
    parameters, gradient = draws(5), draws(5, seed=1)
    moments = tuple(draws(5, seed=2 + place).square() + 0.1 for place in range(len(rule.start(parameters))))
    rate = torch.tensor(0.1, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (parameters, gradient, rate, *moments)]

    def step(parameters, gradient, rate, *moments):
        after, kept = rule.step(parameters, gradient, moments, rate, number)
        return after, *kept

    assert torch.autograd.gradcheck(step, inputs)


def unrolled(momentum, steps=3):
    """w after steps on ½(w − s)² from 0, and the derivative of ½(w − 1)² in s = 2."""
    target, rule = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), SGD(momentum=momentum)
    rate, place = torch.tensor(0.1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    moments = rule.start(place)
    for number in range(steps):
        place, moments = rule.step(place, place - target, moments, rate, number)
    (0.5 * (place - 1).square()).backward()
    return float(place.detach()), float(target.grad)


def test_a_scalar_by_hand():
    assert unrolled(0.0) == pytest.approx((0.542, -0.124118), abs=1e-12)
    assert unrolled(0.9) == pytest.approx((1.028, 0.014392), abs=1e-12)


@pytest.mark.parametrize("rule", [Adam(), Adam(eps=0.1, weight_decay=0.1)], ids=str)
def test_a_parameter_without_gradient_has_a_finite_derivative_under_adam(rule):
    parameters = torch.zeros(2, dtype=torch.float64)
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    after, _ = rule.step(parameters, gradient, rule.start(parameters), torch.tensor(0.1), 0)
    assert after[0] == 0
    (slope,) = torch.autograd.grad(after.sum(), gradient)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SGD, {"momentum": 1.0}),
        (SGD, {"momentum": -0.1}),
        (SGD, {"dampening": 1.0}),
        (SGD, {"weight_decay": -1.0}),
        (SGD, {"nesterov": True}),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        (Adam, {"betas": (0.9, 1.0)}),
        (Adam, {"betas": (-0.1, 0.9)}),
        (Adam, {"eps": 0.0}),
        (Adam, {"weight_decay": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(InvalidSetting, match=next(iter(settings))):
        kind(**settings)
