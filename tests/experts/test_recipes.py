"""Each recipe against a slow loop written from its paper, and what only it promises."""

from dataclasses import dataclass, replace

import pytest
import torch
from methods.stepping import CPU, run_of
from torch import nn
from torch.func import vmap
from torch.nn.functional import cross_entropy

from dsdistill.augmentations import Siamese
from dsdistill.core.config import from_dict, to_dict
from dsdistill.core.rng import Rng
from dsdistill.engine import frozen
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Batch, Experts, ExpertTraining, FlatTraining, Learner, PlainTraining, SmoothTraining
from dsdistill.experts.flat import ascent, orthogonal
from dsdistill.experts.trainer import Pace, Trainer, _ChannelsLast
from dsdistill.experts.trajectories import Trajectories
from dsdistill.networks import FlatNetwork, NetworkSpec

SMALL = NetworkSpec(width=4, depth=2)
EPOCHS = 5
RECIPES = {
    "plain": PlainTraining(epochs=EPOCHS, batch_size=10, lr=0.02),
    "plain with momentum": PlainTraining(epochs=EPOCHS, batch_size=10, momentum=0.5, weight_decay=0.01),
    "flat": FlatTraining(epochs=EPOCHS, batch_size=10, rho=0.1, alpha=0.7),
    "flat, not adaptive": FlatTraining(epochs=EPOCHS, batch_size=10, rho=0.1, adaptive=False),
    "smooth": SmoothTraining(epochs=EPOCHS, batch_size=10, lr=0.01, ramp_epochs=3),
}


# The papers, slowly -----------------------------------------------------------------------------------------


def plain_step(training, network, optimizer, clean, shown, targets, epoch):
    optimizer.zero_grad()
    cross_entropy(network(shown), targets).backward()
    optimizer.step()


def flat_step(training, network, optimizer, clean, shown, targets, epoch):
    parameters = list(network.parameters())

    def gradient():
        network.zero_grad()
        cross_entropy(network(shown), targets).backward()
        return torch.cat([parameter.grad.reshape(-1).double() for parameter in parameters])

    before = [parameter.detach().clone() for parameter in parameters]
    w, g = torch.cat([parameter.reshape(-1).double() for parameter in before]), gradient()
    e = training.rho * (w**2 * g / (w.abs() * g).norm() if training.adaptive else g / g.norm())
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, torch.split(e, sizes), strict=True):
        parameter.data += part.view_as(parameter).float()
    ahead = gradient()
    cosine = g @ ahead / (g.norm() * ahead.norm())
    d = ahead - training.alpha * (g - cosine * g.norm() * ahead / ahead.norm())
    for parameter, kept, part in zip(parameters, before, torch.split(d, sizes), strict=True):
        parameter.data = kept
        parameter.grad = part.view_as(parameter).float()
    optimizer.step()


def smooth_step(training, network, optimizer, clean, shown, targets, epoch):
    ramp = [0.5 + 0.5 * number / training.ramp_epochs for number in range(training.ramp_epochs)]
    clean = clean.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(network(clean).sum(), clean, create_graph=True)
    penalty = ((slopes.norm(dim=1) - 1) ** 2).mean()
    loss = cross_entropy(network(shown), targets) * (ramp[epoch] if epoch < len(ramp) else 1)
    optimizer.zero_grad()
    (loss + 2.0 * penalty).backward()
    optimizer.step()


def by_hand(training, source, spec, *, index=1):
    """Snapshots (epochs + 1, P) of one expert; the authors' loops."""
    step = {"plain": plain_step, "flat": flat_step, "smooth": smooth_step}[
        type(training).__name__.removesuffix("Training").lower()
    ]
    rng = Rng(0).within("expert", index)
    network = spec.build(source.shape, source.num_classes, generator=rng.at("network"), device=CPU)
    rate = training.lr

    def optimizer():
        return torch.optim.SGD(
            network.parameters(), lr=rate, momentum=training.momentum, weight_decay=training.weight_decay
        )

    def vector():
        return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])

    working, snapshots = optimizer(), [vector()]
    images, targets = source.normalization.standardize(source.images), source.targets
    for epoch in range(training.epochs):
        views = rng.at("views", epoch)
        for rows in torch.randperm(len(source), generator=rng.at("order", epoch)).split(training.batch_size):
            record = Siamese().sample(len(rows), source.shape, views, per="image")
            shown = Siamese().apply(images[rows], record)
            step(training, network, working, images[rows], shown, targets[rows], epoch)
        if isinstance(training, SmoothTraining) and epoch == training.epochs // 2 + 1:
            rate *= 0.6
            working = optimizer()
        snapshots.append(vector())
    return torch.stack(snapshots)


@pytest.mark.parametrize("name", RECIPES)
def test_a_trajectory_is_that_of_the_paper(name, source):
    training = RECIPES[name]
    wanted = by_hand(training, source, SMALL)
    moved = (wanted[1:] - wanted[:-1]).norm(dim=1)
    for chunk in (1000, 4):
        made = Trajectories(run_of(source, chunk=chunk), Experts(count=2, training=training), SMALL, EPOCHS)
        found = made.snapshots(1, range(EPOCHS + 1))
        assert torch.equal(found[0], wanted[0])
        assert bool(((found[1:] - found[:-1] - wanted[1:] + wanted[:-1]).norm(dim=1) < 1e-4 * moved).all()), chunk


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("name", RECIPES)
def test_experts_trained_together_are_those_trained_one_by_one(name, norm, source):
    # Without kinks: at one, rounding becomes a different gradient.
    spec, training = replace(SMALL, norm=norm, activation="swish"), replace(RECIPES[name], epochs=2)
    alone = Trajectories(run_of(source, chunk=8), Experts(count=3, training=training), spec, 2)
    stacked = Trajectories(run_of(source, chunk=8), Experts(count=3, training=training, together=2), spec, 2)
    for index in range(3):
        one, other = alone.snapshots(index, [0, 1, 2]), stacked.snapshots(index, [0, 1, 2])
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert float((one[2] - one[1]).norm()) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of code of its own
@pytest.mark.parametrize("name", ["plain", "flat", "smooth"])
@pytest.mark.parametrize("together", [1, 2])
def test_compiled_experts_are_the_others_and_compiled_once(name, together, source):
    spec, run = replace(SMALL, activation="swish"), run_of(source, chunk=8)
    asked = Experts(count=2, training=RECIPES[name], together=together)
    compiled = replace(asked, compiled=True)
    flat = FlatNetwork(run.network(spec, 0))
    trainer = Trainer(run, compiled.training, spec, flat, torch.float32, compiled.seed, compiled=True)
    members, pace = [trainer.fresh(index) for index in range(together)], Pace(CPU)
    trainer.epoch(members, pace)
    with torch.compiler.set_stance("fail_on_recompile"):
        trainer.epoch(members, pace)  # with another factor of the loss
    found = torch.stack(members[0].rows)
    wanted = Trajectories(run, asked, spec, 2).snapshots(0, range(3))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_single_experts_run_channels_last_on_the_cpu(source):
    flat = _ChannelsLast(run_of(source).network(SMALL, 0))
    named = flat.named(flat.vector())
    weights = [weight for weight in named.values() if weight.dim() == 4 and weight.shape[1] > 1]
    assert len(weights) == 2
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(
        torch.equal(weight, parameter)
        for weight, parameter in zip(named.values(), flat.module.parameters(), strict=True)
    )


def test_flips_are_left_out_where_they_change_the_class(source):
    digits = source.with_mirror_safe(False)
    flips = replace(RECIPES["plain"], augmentation=Siamese(("flip",)))
    ends = [
        Trajectories(run_of(images), Experts(count=1, training=training), SMALL, 1).snapshots(0, [1])
        for images in (digits, source)
        for training in (flips, replace(flips, augmentation=None))
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[2], ends[3])


def test_a_recipe_survives_json():
    for training in RECIPES.values():
        experts = Experts(training=training)
        assert from_dict(Experts, to_dict(experts)) == experts
        assert isinstance(training, ExpertTraining)


# Gradients --------------------------------------------------------------------------------------------------


@pytest.fixture
def double(source):
    """A network in float64, its parameters, and a batch."""
    generator = torch.Generator().manual_seed(0)
    module = frozen(SMALL.build(source.shape, 3, generator=generator, device=CPU).double())
    images = torch.randn(2, 7, *source.shape, generator=generator, dtype=torch.float64)
    network = FlatNetwork(module)
    return network, network.vector(), Batch(images[0], images[1], torch.tensor([0, 2, 1, 1, 0, 2, 2]))


def test_the_slope_is_that_of_the_mean_loss_whatever_the_chunk(double):
    network, theta, batch = double
    leaf = theta.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(cross_entropy(network(leaf, batch.shown), batch.targets), leaf)
    for chunk in (None, 3, 1):
        torch.testing.assert_close(Learner(network, chunk).slope(theta, batch), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RECIPES)
def test_directions_inside_a_vmap(name, double):
    network, theta, batch = double
    training, factor = RECIPES[name], torch.tensor(0.75)
    thetas = torch.stack([theta, 1.1 * theta])

    def direction(theta):
        return training.direction(Learner(network, 3, pure=True), theta, batch, factor)

    for one, found in zip(thetas, vmap(direction)(thetas), strict=True):
        wanted = training.direction(Learner(network), one, batch, factor)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


# Flat -------------------------------------------------------------------------------------------------------


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(3)
    w, g, ahead = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    return w, g, ahead


def test_the_second_look_is_rho_away(vectors):
    w, g, _ = vectors
    assert float((ascent(w, g, 0.01, adaptive=True) / w).norm()) == pytest.approx(0.01, rel=1e-9)
    assert float(ascent(w, g, 0.01, adaptive=False).norm()) == pytest.approx(0.01, rel=1e-9)
    assert float(ascent(w, g, 0.01, adaptive=False) @ g) == pytest.approx(0.01 * float(g.norm()), rel=1e-9)


def test_what_is_left_out_is_orthogonal(vectors):
    _, g, ahead = vectors
    v = orthogonal(g, ahead)
    d = ahead - 0.3 * v
    assert float(v @ ahead) == pytest.approx(0, abs=1e-10 * float(g.norm() * ahead.norm()))
    assert float(d @ ahead) == pytest.approx(float(ahead @ ahead), rel=1e-10)
    assert float(d @ d) == pytest.approx(float(ahead @ ahead + 0.09 * v @ v), rel=1e-10)


def test_where_there_is_no_gradient_there_is_no_direction(vectors):
    w, g, _ = vectors
    nothing = torch.zeros_like(g)
    for adaptive in (True, False):
        assert torch.equal(ascent(w, nothing, 0.01, adaptive=adaptive), nothing)
    assert torch.equal(orthogonal(nothing, nothing), nothing)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_without_radius_a_flat_expert_is_a_plain_one(alpha, source):
    settings = {"epochs": 12, "batch_size": 9}
    plain = Trajectories(run_of(source), Experts(count=1, training=PlainTraining(**settings)), SMALL, 12)
    training = FlatTraining(**settings, rho=0.0, alpha=alpha)
    flat = Trajectories(run_of(source), Experts(count=1, training=training), SMALL, 12)
    one, other = plain.snapshots(0, range(13)), flat.snapshots(0, range(13))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # after 48 steps


class Parabola:
    """Stands for a learner whose loss is 5 θ²."""

    def slope(self, theta, batch):
        return 10.0 * theta


def descend(training, steps, start=1.0):
    theta = torch.tensor([start], dtype=torch.float64)
    for _ in range(steps):
        theta = theta - 0.05 * training.direction(Parabola(), theta, None, torch.tensor(1.0))
    return float(theta)


def test_on_a_parabola_steps_end_in_a_cycle_of_two():
    training = FlatTraining(rho=0.1, adaptive=False)
    for steps in (200, 201):
        assert abs(descend(training, steps)) == pytest.approx(1 / 30, rel=1e-9)
    assert descend(training, 200) == pytest.approx(-descend(training, 201), rel=1e-9)


def test_on_a_parabola_adaptive_steps_shrink_by_a_constant():
    assert descend(FlatTraining(rho=0.1), 7) == pytest.approx(0.00373669, rel=1e-5)


# What recipes are found by ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fading(PlainTraining):
    """A user's recipe: its step size falls to 0 over all epochs."""

    def learning_rate(self, epoch):
        return self.lr * (1 - epoch / self.epochs)


@pytest.mark.parametrize("training", [PlainTraining(), FlatTraining()], ids=lambda training: type(training).__name__)
def test_experts_of_few_epochs_are_the_beginning_of_those_of_more(training):
    assert replace(training, epochs=7).identity() == training.identity()
    assert training.identity() == {name: value for name, value in to_dict(training).items() if name != "epochs"}
    assert replace(training, lr=0.5).identity() != training.identity()


@pytest.mark.parametrize("training", [SmoothTraining(), Fading()], ids=lambda training: type(training).__name__)
def test_experts_whose_schedule_depends_on_the_number_of_epochs_are_others(training):
    assert training.identity() == to_dict(training)
    assert replace(training, epochs=7).identity() != training.identity()


# Smooth -----------------------------------------------------------------------------------------------------


def test_the_schedule_of_smooth_experts():
    training = SmoothTraining()
    wanted = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0]
    assert [training.loss_factor(epoch) for epoch in range(12)] == pytest.approx(wanted)
    rates = [training.learning_rate(epoch) for epoch in range(50)]
    assert rates == pytest.approx([0.003] * 27 + [0.0018] * 23)
    assert [epoch for epoch in range(50) if training.restarts(epoch)] == [0, 27]


def test_a_network_that_ignores_its_images_has_a_penalty_with_a_derivative(double):
    network, theta, batch = double
    direction = SmoothTraining().direction(Learner(network), torch.zeros_like(theta), batch, torch.tensor(0.5))
    assert bool(torch.isfinite(direction).all())


def test_the_penalty_draws_the_norm_of_each_pixel_to_its_target(double):
    """Of a linear network the gradient of every image is the same: Σ_c w_c."""
    _, _, batch = double
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3, bias=False)).double()
    network = FlatNetwork(frozen(linear))
    theta = network.vector().requires_grad_()
    norms = theta.view(3, 3, 8, 8).sum(0).norm(dim=0)
    penalty = 0.5 * ((norms - 0.25) ** 2).mean()
    (wanted,) = torch.autograd.grad(penalty + 0.5 * cross_entropy(network(theta, batch.shown), batch.targets), theta)
    training = SmoothTraining(penalty=0.5, penalty_target=0.25)
    for chunk in (None, 2):
        found = training.direction(Learner(network, chunk), theta.detach(), batch, torch.tensor(0.5))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_a_step_that_cannot_be_compiled_is_told_apart_from_one_that_cannot_be_stacked(source, monkeypatch):
    from torch._dynamo.exc import TorchRuntimeError

    def failing(*given, **options):
        def call(*arguments):
            raise TorchRuntimeError("no compiler inside vmap")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(InvalidSetting, match=r"Experts.compiled.*no compiler inside vmap.*false trains without"):
        Trajectories(run_of(source), Experts(count=2, together=2, compiled=True, training=RECIPES["plain"]), SMALL, 1)
