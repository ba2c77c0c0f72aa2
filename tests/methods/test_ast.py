"""AST: its loss, its start, its noise, against plain formulas."""

import math
from dataclasses import replace

import pytest
import torch
from methods.following import followed, gap, table_of
from methods.stepping import begin, run_of

from dsdistill.errors import InvalidSetting
from dsdistill.experts import Experts, SmoothTraining
from dsdistill.methods import AST
from dsdistill.methods.ast import balance, perturbed
from dsdistill.networks import FlatNetwork, NetworkSpec
from dsdistill.selection import pick, representative_indices
from dsdistill.testing import check_synthesizer, toy_source

SMALL = NetworkSpec(width=4, depth=1)
FEW = Experts(count=2, training=SmoothTraining(epochs=6, batch_size=12, lr=0.01))
METHOD = AST(
    ipc=2,
    iterations=3,
    student_steps=7,
    expert_epochs=3,
    max_start_epoch=3,
    batch_size=4,
    lr_images=1.0,
    lr_student=0.01,
    network=SMALL,
    experts=FEW,
)


@pytest.mark.parametrize(
    ("epoch", "end", "expected"),
    [
        *[(0, 20, 0.557), (5, 20, 0.627), (9, 20, 0.732), (10, 20, 1.292), (15, 20, 1.594), (19, 20, 1.760)],
        *[(0, 40, 0.483), (20, 40, 1.292), (39, 40, 2.048)],
        *[(6, 15, 0.732), (7, 15, 1.292), (14, 15, 1.683)],  # half of an odd number is rounded down
    ],
)
def test_balance(epoch, end, expected):
    assert balance(epoch, end) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("steps", "epochs", "at"), [(20, 3, (6, 12, 20)), (40, 3, (13, 26, 40)), (30, 2, (15, 30)), (5, 1, (5,))]
)
def test_stops(steps, epochs, at):
    method = AST(student_steps=steps, expert_epochs=epochs)
    assert method.stops == (at, dict.fromkeys(range(1, epochs + 1), 1.0))


def test_weights_of_the_stops():
    adaptive = AST(student_steps=20, expert_epochs=3, intermediate="adaptive")
    assert adaptive.stops == ((6, 12, 20), {1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert replace(adaptive, intermediate="none").stops == ((20,), {3: 1.0})


@pytest.mark.parametrize("intermediate", ["aggregate", "adaptive", "none"])
@pytest.mark.parametrize("balanced", [True, False])
def test_a_step_equals_the_formula(source, intermediate, balanced):
    method = replace(METHOD, intermediate=intermediate, balance=balanced)
    run = run_of(source)
    state, twin = begin(method, run), begin(method, run)
    segment = method.segment(run, 1)
    start, *targets = segment.after(0, 1, 2, 3)
    noise = run.rng.at("perturbation", 1, device="cpu")
    start = perturbed(segment.trajectories.network, start, 1.0, noise)
    factor = balance(segment.epoch, 3) if balanced else 1.0
    path, images, _, rate = followed(method, run, twin, 1, start, momentum=0.9, factor=factor)
    weights = {"aggregate": (1, 1, 1), "adaptive": (1 / 3, 2 / 3, 1), "none": (0, 0, 1)}[intermediate]
    loss = sum(w * gap(path[tau], start, target) for w, tau, target in zip(weights, (2, 4, 7), targets, strict=True))
    of_images, of_rate = torch.autograd.grad(loss, (images, rate))
    told = method.step(run, state, 1)
    assert float(told["loss"]) == pytest.approx(loss.item(), rel=1e-4)
    found = state.images.pixels.grad
    assert torch.allclose(found, of_images.float(), rtol=1e-3, atol=1e-3 * float(of_images.abs().max()))
    assert float(state.extras["lr"].raw.grad) == pytest.approx(float(of_rate), rel=1e-3)


def test_only_weights_of_convolutions_are_perturbed_and_by_noise_of_norm_1_per_layer():
    spec = NetworkSpec(width=16, depth=2)
    module = spec.build((3, 8, 8), 3, generator=torch.Generator().manual_seed(0), device="cpu")
    network = FlatNetwork(module)
    theta = network.vector().double()
    moved = perturbed(network, theta, 0.5, torch.Generator().manual_seed(1))
    for parameter, before, after in zip(module.parameters(), network.split(theta), network.split(moved), strict=True):
        if parameter.dim() != 4:
            assert torch.equal(before, after)
            continue
        noise, count = (after - before) / before / 0.5, before.numel()
        assert float(noise.norm()) == pytest.approx(1, abs=1e-9)
        # In units of its deviation noise has mean 0, to 1/√n, and is as often positive; squares of weights and of
        # normal noise are independent, so that 1/√n of each weight moves, to the spread of their products.
        assert abs(float(noise.sum())) < 3
        assert abs(float(noise.sign().sum())) < 3 * math.sqrt(count)
        fourth = float((noise * math.sqrt(count)).pow(4).mean())
        assert fourth == pytest.approx(3, abs=3 * math.sqrt(96 / count))  # of normal noise
        weights = before.square() / before.square().sum()
        spread = math.sqrt(2 * float(weights.square().sum()))
        relative = (float((after - before).norm() / before.norm()) / 0.5) ** 2 * count
        assert abs(relative - 1) < 3 * spread
    assert perturbed(network, theta, 0.0, torch.Generator()) is theta


def test_each_step_has_noise_of_its_own_and_the_same_when_repeated(source):
    run = run_of(source)
    method = replace(METHOD, lr_images=1e-9, lr_lr=0.0)
    losses = [float(method.step(run, begin(method, run), iteration)["loss"]) for iteration in (0, 0)]
    assert losses[0] == losses[1]
    without = replace(method, perturbation=0.0)
    assert float(without.step(run, begin(without, run), 0)["loss"]) != losses[0]


def by_class(run):
    return [
        run.source.gather(torch.arange(run.source.offsets[label], run.source.offsets[label + 1]))
        for label in run.classes
    ]


def test_the_start_is_representative_of_each_class(source):
    run = run_of(source)
    method = replace(METHOD, ipc=3)
    images = begin(method, run).images.decode().images.detach()
    trajectories = method.trajectories(run)
    theta = trajectories.snapshots(0, [method.last_epoch])[0]
    wanted = pick(run, representative_indices, [trajectories.network(theta, real) for real in by_class(run)], 3)
    for place, label in enumerate(run.classes):
        rows = torch.arange(run.source.offsets[label], run.source.offsets[label + 1])
        real = run.source.gather(rows)
        block = images[3 * place : 3 * place + 3]
        places = [(real == image).flatten(1).all(1).nonzero().flatten().tolist() for image in block]
        assert all(len(found) == 1 for found in places)
        assert [int(rows[found[0]]) for found in places] == wanted[place].tolist()
    other = begin(replace(method, init="random"), run).images.decode().images
    assert not torch.equal(images, other)


def test_a_student_that_makes_fewer_steps_than_stops_is_refused(source):
    few = replace(METHOD, student_steps=2)
    with pytest.raises(InvalidSetting, match=r"AST.student_steps = 2 .*expert_epochs=3.*intermediate='none'"):
        few.check(source)
    replace(few, intermediate="none").check(source)
    replace(few, student_steps=3).check(source)


def test_settings_by_default():
    method, training = AST(), SmoothTraining()
    assert method.experts == Experts(count=100, training=training)
    assert (method.init, method.momentum_student, method.balance) == ("representative", 0.9, True)
    assert (method.intermediate, method.perturbation) == ("aggregate", 1.0)
    assert (training.epochs, training.batch_size, training.lr, training.momentum) == (50, 256, 0.003, 0.9)
    assert (training.weight_decay, training.lr_drop, training.penalty, training.penalty_target) == (1e-3, 0.6, 2.0, 1.0)
    assert (training.ramp_start, training.ramp_epochs) == (0.5, 10)


def test_its_students_have_the_momentum_of_its_experts(source, caplog):
    METHOD.prepare(run_of(source))
    assert not caplog.records
    replace(METHOD, momentum_student=0.0).prepare(run_of(source))
    assert "AST: experts.training.momentum = 0.9, and the student's momentum is 0" in caplog.text


def test_presets_say_where_images_were_standardised_otherwise():
    others = {name for name, preset in AST.presets.items() if "mean and deviation of CIFAR-10" in preset.source}
    assert others == {"cifar100/ipc1/script", "cifar100/ipc10", "cifar100/ipc50"}


def test_presets_are_those_of_the_authors():
    near, every, off = "representative", "aggregate", "none"
    assert table_of(AST, "init", "balance", "intermediate", "perturbation", "momentum_student", "experts.training") == {
        name: (*row, 0.9, SmoothTraining(), white)
        for name, (*row, white) in {
            "cifar100/ipc1": (1, 20, 3, 20, None, 1000, 1e-5, 0.01, 5000, near, True, every, 1, True),
            "cifar100/ipc1/script": (1, 40, 3, 15, None, 100, 1e-5, 0.01, 5000, near, False, every, 1, False),
            "cifar100/ipc10": (10, 20, 2, 30, 128, 1000, 1e-5, 0.01, 5000, near, False, every, 1, False),
            "cifar100/ipc50": (50, 80, 2, 40, 700, 1000, 1e-5, 0.01, 5000, near, False, off, 0, False),
            "cifar10/ipc10": (10, 30, 2, 20, None, 100, 1e-6, 0.01, 5000, "random", True, every, 1, True),
            "tiny_imagenet/ipc1": (1, 10, 2, 10, None, 10_000, 1e-4, 0.01, 5000, "random", False, every, 1, False),
        }.items()
    }


@pytest.mark.parametrize("changes", [{"init": "random"}, {"intermediate": "none", "balance": False}], ids=str)
def test_ast_keeps_the_contract_in_its_variants(changes):
    assert len(check_synthesizer(replace(METHOD, **changes), toy_source(per_class=14))) == 9
