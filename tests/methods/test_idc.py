"""IDC against plain loops with an optimiser step per class, and what only this paper promises."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_images
from methods.condensing import double_run, learned, settings_of, settle, start
from torch.nn.functional import cross_entropy

from dsdistill import estimate, synthesize
from dsdistill.augmentations import Chain, CutMix, Siamese
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


@pytest.mark.parametrize(("classes", "momentum"), [((0, 1, 2), 0.5), ((2, 0), 0.9), ((1,), 0.5), ((0, 1, 2), 0.0)])
def test_the_optimiser_makes_the_turns_of_all_classes(classes, momentum, double):
    method = replace(TINY, momentum=momentum, lr_images=0.02, ipc=3, lr_size=16)
    (group,) = start(method, double_run(classes=classes)).optimizers["images"].param_groups
    rate = 0.02 * 3 / 10 * (8 / 16) ** 2
    assert group["lr"] == pytest.approx(rate * sum(momentum**turn for turn in range(len(classes))))
    assert group["momentum"] == pytest.approx(momentum ** len(classes))


def slow_idc(method, run, distance):
    """An optimiser step per class, a clamp per network, all in plain loops.

    Returns [0, 1] pixels after all iterations, and as they were at each class's turn of each pass.
    """
    source, state = run.source, start(method, run)
    pixels, labels = unit(run, state.images.pixels), state.labels.classes
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (source.normalization.mean, source.normalization.std)
    )
    views = method.augmentation.suited(source.mirror_safe)
    rate = method.lr_images * method.ipc / 10 * 64 / method.lr_size**2
    speed, turns = torch.zeros_like(pixels), []
    for k in range(method.iterations):
        network = method.network.build(source.shape, 3, generator=run.rng.at("network", k), device="cpu")
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=method.lr_network,
            momentum=method.momentum_network,
            weight_decay=method.weight_decay,
        )
        every = torch.arange(len(source))
        _train(method, source, network, optimizer, every, method.pretraining, run.rng.within("pretraining", k))
        convolutions = [parameter for parameter in network.parameters() if parameter.dim() == 4]
        for t in range(method.inner_steps):
            i = k * method.inner_steps + t
            settle(run, network, i)
            index = source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", i))
            record = views.sample(len(run.classes), source.shape, run.rng.at("views", i))
            draws = run.rng.at("synthetic", i)
            for position, label in enumerate(run.classes):
                turns.append(pixels)
                state.images.pixels.data.copy_((pixels - mean) / std)
                images, owner = state.images.decode((labels == label).nonzero().flatten())
                if len(images) > method.synthetic_batch:
                    kept = torch.randperm(len(images), generator=draws)[: method.synthetic_batch]
                    images, owner = images[kept], owner[kept]
                rows = index[source.targets[index] == label]
                gradients = []
                for shown, targets in ((source.gather(rows), source.targets[rows]), (images, labels[owner])):
                    logits = network(views.apply(shown, record, [position] * len(shown)))
                    loss = cross_entropy(logits, targets)
                    gradients.append(torch.autograd.grad(loss, convolutions, create_graph=True))
                real = [gradient.detach() for gradient in gradients[0]]
                (slope,) = torch.autograd.grad(distance(real, gradients[1]), state.images.pixels)
                speed = method.momentum * speed + slope / std
                pixels = pixels - rate * speed
            if t == method.inner_steps - 1:
                pixels = pixels.clamp(0, 1)
                break
            count = math.ceil(method.trained_on / method.batch_size) * method.batch_size
            rows = torch.randperm(len(source), generator=run.rng.at("trained_on", i))[:count]
            _train(method, source, network, optimizer, rows, 1, run.rng.within("training", i))
    return pixels, turns


def _train(method, source, network, optimizer, rows, epochs, streams):
    network.train()
    augmentation = method.network_augmentation.suited(source.mirror_safe)
    order, views, mixes = (streams.at(name) for name in ("order", "views", "mix"))
    for _ in range(epochs):
        for places in torch.split(torch.randperm(len(rows), generator=order), method.batch_size):
            images, targets = source.gather(rows[places]), source.targets[rows[places]]
            record = augmentation.sample(len(images), source.shape, views, per="image")
            images = augmentation.apply(images, record)
            mix = method.mix.sample(len(images), source.shape, mixes)
            if mix.share < 1:
                images, targets = method.mix.apply(images, mix), method.mix.targets(targets, mix, 3)
            optimizer.zero_grad()
            cross_entropy(network(images), targets).backward()
            optimizer.step()


WHOLE = replace(
    TINY,
    synthetic_batch=3,
    lr_images=0.2,
    augmentation=IDC().augmentation,
    network_augmentation=IDC().network_augmentation,
    mix=CutMix(probability=0.5),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": Plain(), "ipc": 5, "pretraining": 2},
        {"form": Tiled(factor=2)},
        {"form": Tiled(factor=2), "network": replace(SMOOTH, norm="batch")},
    ],
    ids=["f1", "f2", "batch"],
)
@pytest.mark.parametrize(("name", "distance"), [("squared", squared_error), ("l1", absolute_error)])
def test_a_run_is_that_of_plain_loops(name, distance, changes, double):
    """One class, so that its momentum is at rest when the pixels are clamped."""
    run, method = double_run(classes=(1,), chunk=4), replace(WHOLE, distance=name, **changes)
    state = start(method, run)
    before = unit(run, state.images.pixels)
    expected, _ = slow_idc(method, run, distance)
    for iteration in range(method.steps):
        method.step(run, state, iteration)
    found = unit(run, state.images.pixels)
    assert float((found - before).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("classes", [(0, 1, 2), (2, 0)])
def test_each_class_is_at_its_own_turns_where_steps_per_class_bring_it(classes, double):
    run, method = double_run(classes=classes), replace(WHOLE, iterations=1, inner_steps=5)
    state = start(method, run)
    _, turns = slow_idc(method, run, squared_error)
    assert len(turns) == 5 * len(classes)
    for iteration in range(method.steps):
        found = unit(run, state.images.pixels)
        for position, label in enumerate(classes):
            own = state.labels.classes == label
            expected = turns[iteration * len(classes) + position][own]
            torch.testing.assert_close(found[own], expected, rtol=1e-7, atol=1e-9)
        method.step(run, state, iteration)
    assert float((turns[-1] - turns[0]).abs().flatten(1).amax(1).min()) > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("augmentation", None),
        ("network_augmentation", None),
        ("mix", None),
        ("synthetic_batch", 9),
        ("momentum", 0.0),
    ],
)
def test_every_part_of_the_comparison_has_a_part_in_the_pixels(name, value, double):
    method = replace(WHOLE, form=Tiled(factor=2), iterations=1)
    assert not torch.equal(learned(replace(method, **{name: value}), double_run()), learned(method, double_run()))


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
    assert all(len(set(rows)) == 12 for rows in batches)  # 10 in whole batches of 4
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


def test_no_more_real_images_are_trained_on_than_there_are(source, monkeypatch):
    seen = []
    monkeypatch.setattr(idc_module, "train_on_real", lambda *_, rows, **rest: seen.append(len(rows)))
    synthesize(replace(TINY, iterations=1, trained_on=35, batch_size=8), source, device="cpu")
    assert seen == [36, 36]


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "wrapped"])
def test_an_estimate_counts_the_pretraining_of_every_network(wrap, source, monkeypatch):
    """The first network's is rehearsed, and takes 100 seconds by its own account."""
    pretrained = []

    def noted(run, network, recipe, rng, *, rows, optimizer):
        if rows is None:
            pretrained.append(recipe.epochs)
            run.shared.rehearsal.seconds += 100

    monkeypatch.setattr(idc_module, "train_on_real", noted)
    method = replace(TINY, form=Plain(), iterations=5, inner_steps=2, pretraining=4)
    cost = estimate(FYI(base=method) if wrap else method, source, device="cpu")
    assert cost.rehearsed == 10  # several networks, of which the first alone is pretrained
    assert pretrained == [4] * 3
    assert 500 < cost.seconds < 600


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


PUBLISHED = {
    "ipc": 10,
    "form": Tiled(factor=2, bound=None),
    "on_small_class": "error",
    "iterations": 2000,
    "inner_steps": 100,
    "real_batch": 64,
    "synthetic_batch": 128,
    "lr_images": 5e-3,
    "lr_size": 32,
    "momentum": 0.5,
    "distance": "squared",
    "network": NetworkSpec("convnet"),
    "pretraining": 0,
    "trained_on": 2000,
    "lr_network": 0.01,
    "momentum_network": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 64,
    "mix": CutMix(probability=0.5, alpha=1.0),
    "network_augmentation": Chain((Siamese(("color",)), Siamese(("crop",)))),
    "augmentation": Chain((Siamese(("color",)), Siamese(("crop",)), Siamese(("cutout",)))),
}
GREY = {"distance": "l1", "lr_images": 1e-4, "trained_on": 500}
DIGITS = GREY | {"lr_size": 28}
UNCUT = {"augmentation": Chain((Siamese(("color",)), Siamese(("crop",)))), "mix": None}
LARGE = {
    "distance": "l1",
    "lr_images": 3e-3,
    "lr_size": 224,
    "trained_on": 500,
    "iterations": 500,
    "pretraining": 10,
    "mix": CutMix(probability=1.0, alpha=1.0),
    "network": NetworkSpec("resnet_ap10"),
}
PLAIN, COARSE = {"form": Plain()}, {"form": Tiled(factor=3, bound=None)}
BY_DATA = {  # budgets, and what differs at f > 1 and at f = 1
    "cifar10": ((1, 10, 50), {}, PLAIN),
    "cifar100": ((10, 20), {}, PLAIN),
    "svhn": ((1, 10, 50), {"trained_on": 500}, {"trained_on": 500} | PLAIN),
    "mnist": ((1, 10, 50), DIGITS | UNCUT, DIGITS | PLAIN),
    "fashion_mnist": ((1, 10, 50), GREY, GREY | PLAIN),
    "imagenet10": ((10, 20), LARGE | COARSE, LARGE | PLAIN),
}


def test_presets_are_the_published_settings():
    assert settings_of(IDC()) == PUBLISHED
    expected = {}
    for data, (budgets, tiled, plain) in BY_DATA.items():
        for ipc in budgets:
            expected[f"{data}/ipc{ipc}"] = PUBLISHED | {"ipc": ipc} | tiled
            expected[f"{data}/ipc{ipc}/f1"] = PUBLISHED | {"ipc": ipc} | plain
    assert {name: settings_of(IDC.preset(name)) for name in IDC.presets} == expected
    assert IDC.preset("imagenet10/ipc20").form.images_per_class(20) == 180  # as the authors score it


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
