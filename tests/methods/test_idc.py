"""IDC: steps per class against the exact batched form, plain loops, and what only this paper promises."""

from dataclasses import replace

import pytest
import torch
from conftest import make_images
from methods.condensing import double_run, start
from torch.nn.functional import cross_entropy

from dsdistill import estimate, synthesize
from dsdistill.augmentations import CutMix, always_flip_color_cutout
from dsdistill.data import ImageSource
from dsdistill.engine import Run
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.methods import FYI, IDC
from dsdistill.methods import idc as idc_module
from dsdistill.networks import NetworkSpec
from dsdistill.objectives import absolute_error, squared_error
from dsdistill.parameterizations import Plain, Tiled
from dsdistill.testing import check_synthesizer

SMOOTH = NetworkSpec(width=3, depth=2, activation="swish")
TINY = IDC(
    ipc=2,
    iterations=2,
    inner_steps=3,
    real_batch=5,
    trained_on=10,
    batch_size=4,
    lr_images=1.0,
    lr_size=8,
    network=SMOOTH,
    augmentation=None,
    network_augmentation=None,
    mix=None,
)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unit(run, images):
    """Standardised images in [0, 1] units."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1)
        for values in (run.source.normalization.mean, run.source.normalization.std)
    )
    return images.detach() * std + mean


# The update --------------------------------------------------------------------------------------------------


def test_one_step_with_other_settings_is_a_step_per_class(double):
    """At each of its own turns a class is where single steps, with zero gradients in the others' turns, bring it."""
    classes, momentum, rate, passes = 5, 0.5, 0.3, 6
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(passes, classes, 4, generator=generator)
    sequential = torch.zeros(classes, 4, requires_grad=True)
    alone = torch.optim.SGD([sequential], lr=rate, momentum=momentum)
    turns = torch.zeros(passes, classes, 4)
    for step in range(passes):
        for c in range(classes):
            turns[step, c] = sequential.detach()[c]
            sequential.grad = torch.zeros(classes, 4)
            sequential.grad[c] = gradients[step, c]
            alone.step()
    batched = torch.zeros(classes, 4, requires_grad=True)
    factor = (1 - momentum**classes) / (1 - momentum)
    together = torch.optim.SGD([batched], lr=rate * factor, momentum=momentum**classes)
    for step in range(passes):
        assert float((batched.detach() - turns[step]).abs().max()) < 1e-14
        batched.grad = gradients[step].clone()
        together.step()


@pytest.mark.parametrize(("classes", "momentum"), [((0, 1, 2), 0.5), ((2, 0), 0.9), ((1,), 0.5), ((0, 1, 2), 0.0)])
def test_the_optimiser_makes_the_turns_of_all_classes(classes, momentum, double):
    method = replace(TINY, momentum=momentum, lr_images=0.02, ipc=3, lr_size=16)
    (group,) = start(method, double_run(classes=classes)).optimizers["images"].param_groups
    rate = 0.02 * 3 / 10 * (8 / 16) ** 2
    assert group["lr"] == pytest.approx(rate * sum(momentum**turn for turn in range(len(classes))))
    assert group["momentum"] == pytest.approx(momentum ** len(classes))


def slow_idc(method, run, distance):
    """[0, 1] pixels after all iterations: an optimiser step per class, a clamp per network, all in plain loops."""
    source, state = run.source, start(method, run)
    pixels, labels, speed = unit(run, state.images.pixels), state.labels.classes, None
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (source.normalization.mean, source.normalization.std)
    )
    rate = method.lr_images * method.ipc / 10 * 64 / method.lr_size**2
    speed = torch.zeros_like(pixels)
    for k in range(method.iterations):
        network = method.network.build(source.shape, 3, generator=run.rng.at("network", k), device="cpu")
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=method.lr_network,
            momentum=method.momentum_network,
            weight_decay=method.weight_decay,
        )
        convolutions = [parameter for parameter in network.parameters() if parameter.dim() == 4]
        for t in range(method.inner_steps):
            i = k * method.inner_steps + t
            index = source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", i))
            for label in run.classes:
                leaf = pixels.clone().requires_grad_()
                state.images.pixels.data.copy_((leaf.detach() - mean) / std)
                items = (labels == label).nonzero().flatten()
                images, owner = state.images.decode(items)
                rows = index[source.targets[index] == label]
                real = torch.autograd.grad(
                    cross_entropy(network(source.gather(rows)), source.targets[rows]), convolutions
                )
                made = torch.autograd.grad(
                    cross_entropy(network(images), labels[owner]), convolutions, create_graph=True
                )
                (slope,) = torch.autograd.grad(distance(real, made), state.images.pixels)
                speed = method.momentum * speed + slope / std
                pixels = pixels - rate * speed
            if t == method.inner_steps - 1:
                pixels = pixels.clamp(0, 1)
                break
            rows = torch.randperm(len(source), generator=run.rng.at("trained_on", i))[: method.trained_on]
            order = run.rng.within("training", i).at("order")
            for places in torch.split(torch.randperm(len(rows), generator=order), method.batch_size):
                chosen = rows[places]
                optimizer.zero_grad()
                cross_entropy(network(source.gather(chosen)), source.targets[chosen]).backward()
                optimizer.step()
    return pixels


@pytest.mark.parametrize("form", [Plain(), Tiled(factor=2)], ids=["f1", "f2"])
@pytest.mark.parametrize(("name", "distance"), [("squared", squared_error), ("l1", absolute_error)])
def test_a_pass_is_that_of_plain_loops(name, distance, form, double):
    """One class, so that its momentum is at rest when the pixels are compared."""
    run = double_run(classes=(1,), chunk=8)
    method = replace(TINY, distance=name, form=form, lr_images=0.2)
    state = start(method, run)
    before = unit(run, state.images.pixels)
    expected = slow_idc(method, run, distance)
    for iteration in range(method.steps):
        method.step(run, state, iteration)
    found = unit(run, state.images.pixels)
    assert float((found - before).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_pixels_are_clamped_when_a_network_is_done(double):
    run = double_run()
    method = replace(TINY, lr_images=1e4)
    state = start(method, run)
    ranges = []
    for iteration in range(method.steps):
        method.step(run, state, iteration)
        pixels = unit(run, state.images.pixels)
        ranges.append(float((pixels - pixels.clamp(0, 1)).abs().max()))
    assert max(ranges[2], ranges[5]) < 1e-12
    assert min(ranges[0], ranges[1]) > 0.1


# Networks ----------------------------------------------------------------------------------------------------


def test_networks_are_trained_on_random_real_images_between_updates(source, monkeypatch):
    seen, drawn = [], []
    network, train = Run.network, idc_module.train_on_real
    monkeypatch.setattr(Run, "network", lambda self, spec, k: drawn.append(k) or network(self, spec, k))

    def noted(run, network, recipe, rng, *, rows, optimizer):
        seen.append((recipe.epochs, None if rows is None else tuple(rows.tolist()), optimizer))
        train(run, network, recipe, rng, rows=rows, optimizer=optimizer)

    monkeypatch.setattr(idc_module, "train_on_real", noted)
    synthesize(replace(TINY, pretraining=4), source, device="cpu")
    assert drawn == [0, 0, 1]
    assert [epochs for epochs, _, _ in seen] == [4, 1, 1] * 2
    assert [rows is None for _, rows, _ in seen] == [True, False, False] * 2
    batches = [rows for _, rows, _ in seen if rows is not None]
    assert all(len(set(rows)) == 10 for rows in batches)
    assert len(set(batches)) == 4
    assert any(max(rows) > 24 for rows in batches)  # all classes, not the first images
    optimizers = [optimizer for _, _, optimizer in seen]
    assert optimizers[0] is optimizers[2] is not optimizers[3] is optimizers[5]


def test_a_rehearsal_makes_every_step_in_full(source, monkeypatch):
    steps = []
    monkeypatch.setattr(idc_module, "train_on_real", lambda run, *rest, **more: steps.append(run.shared.rehearsal))
    estimate(replace(TINY, iterations=1), source, device="cpu")
    assert steps
    assert not any(steps)


@pytest.mark.parametrize(
    ("network", "problem"),
    [(NetworkSpec("mlp", width=4), "2-D convolutions"), (NetworkSpec("convnet", depth=9), "depth")],
)
def test_networks_that_do_not_do_are_refused(network, problem, source):
    with pytest.raises(InvalidSetting, match=problem):
        synthesize(replace(TINY, network=network), source, device="cpu")


def test_sources_that_do_not_do_are_refused(source):
    alone = ImageSource("alone", ["only"], *make_images(6, 1, (3, 8, 8), seed=2))
    with pytest.raises(BadData, match=r"IDC .*'alone' has one class"):
        synthesize(replace(TINY, form=Plain()), alone, device="cpu")
    whitened = source.normalized_by(source.normalization.whitened([source.images]))
    with pytest.raises(BadData, match="whitened"):
        synthesize(TINY, whitened, device="cpu")


# Start -------------------------------------------------------------------------------------------------------


def test_images_start_as_tiles_of_distinct_random_real_ones():
    images, targets = make_images(12, 3, (3, 8, 8), seed=0)
    images = (torch.arange(36) * 7).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    source = ImageSource("flat", ["a", "b", "c"], images, targets)
    firsts = []
    for seed in range(3):
        run = Run(source.train_only(), torch.device("cpu"), replace(double_run().rng, seed=seed), (0, 1, 2), 64)
        state = start(TINY, run)
        shown, owner = state.images.decode()
        values = (unit(run, shown) * 255).flatten(1)
        assert float(values.std(1).max()) < 1e-3
        numbers = (values.mean(1) / 7).round().long()
        assert targets[numbers].tolist() == state.labels.classes[owner].tolist()
        assert len(set(numbers.tolist())) == len(numbers) == 3 * 2 * 4
        firsts.append(tuple(sorted(numbers[state.labels.classes[owner] == 0].tolist())))
    assert len(set(firsts)) > 1  # not always the first images of the class


# Settings ----------------------------------------------------------------------------------------------------


def test_presets_are_the_published_settings():
    assert IDC.preset("cifar10/ipc10") == IDC(ipc=10)
    assert IDC.preset("cifar10/ipc10/f1") == IDC(ipc=10, form=Plain())
    small = IDC.preset("mnist/ipc1")
    assert (small.distance, small.lr_images, small.lr_size, small.trained_on, small.mix) == ("l1", 1e-4, 28, 500, None)
    assert small.augmentation == always_flip_color_cutout(("color", "crop"))
    plain = IDC.preset("mnist/ipc1/f1")
    assert (plain.mix, plain.augmentation) == (CutMix(probability=0.5), IDC().augmentation)
    assert IDC.preset("fashion_mnist/ipc10").lr_size == 32
    large = IDC.preset("imagenet10/ipc20")
    assert large.form == Tiled(factor=3, bound=128)
    assert (large.pretraining, large.iterations, large.network.name) == (10, 500, "resnet_ap10")


@pytest.mark.parametrize(
    "changes",
    [
        {"network": NetworkSpec(width=4, depth=1, norm="batch")},
        {"form": Plain(), "distance": "l1", "synthetic_batch": 1},
    ],
    ids=str,
)
def test_the_contract_is_kept_in_variants(changes, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    quick = replace(TINY, ipc=2, network=NetworkSpec(width=4, depth=1))
    assert len(check_synthesizer(replace(quick, **changes))) == 9


def test_it_can_be_wrapped(source):
    made = synthesize(FYI(base=TINY), source, device="cpu")
    assert made.images.key == "tiles"
    assert float((unit(Run(source, None, None, (0,), 1), made.tensors()[0]) - 0.5).abs().max()) < 0.5 + 1e-5
