"""DC against plain loops in float64, and what only this paper promises."""

from dataclasses import replace

import pytest
import torch
from conftest import make_images
from methods.condensing import double_run, learned, settings_of, slow_condensation, start

from dsdistill import synthesize
from dsdistill.data import ImageSource
from dsdistill.engine import Run
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.labels import SoftLabels
from dsdistill.matching import GradientCondensation, condensation, loops
from dsdistill.methods import DC, FYI, IDC
from dsdistill.networks import NetworkSpec
from dsdistill.networks import spec as spec_module
from dsdistill.objectives import global_cosine, squared_error
from dsdistill.parameterizations import Plain, Tiled
from dsdistill.testing import check_synthesizer

SMOOTH = NetworkSpec(width=3, depth=2, activation="swish")
TINY = DC(ipc=3, iterations=2, outer_loop=3, inner_epochs=2, real_batch=5, batch_size=4, lr_network=0.1, network=SMOOTH)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(method, run, expected=None):
    expected = slow_condensation(method, run) if expected is None else expected
    found = learned(method, run)
    assert float((found - start(method, run).images.pixels.detach()).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# The algorithm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("init", ["noise", "real"])
def test_a_run_is_that_of_plain_loops(init, chunk, double):
    check(replace(TINY, init=init), double_run(chunk=chunk))


@pytest.mark.parametrize("chunk", [4, 1000])
def test_batch_normalisation_is_settled_before_each_update_and_trains_in_between(chunk, double):
    check(replace(TINY, network=replace(SMOOTH, norm="batch")), double_run(chunk=chunk))


def test_momentum_of_training_networks_lasts_as_long_as_the_network(double):
    method = replace(TINY, momentum_network=0.5)
    check(method, double_run())
    assert not torch.equal(learned(method, double_run()), learned(TINY, double_run()))


@pytest.mark.parametrize(("name", "distance"), [("squared", squared_error), ("cosine", global_cosine)])
def test_other_distances_are_over_weights_too(name, distance, double):
    run, method = double_run(), replace(TINY, distance=name, iterations=1, lr_images=10.0)

    def weights_alone(real, synthetic):
        kept = [index for index, one in enumerate(real) if one.dim() > 1]
        return distance([real[index] for index in kept], [synthetic[index] for index in kept])

    check(method, run, slow_condensation(method, run, distance=weights_alone))


def test_a_pass_over_part_of_the_classes(double):
    check(replace(TINY, iterations=1), double_run(classes=(2, 0)))


def test_pairs_double_the_images_that_are_matched_and_the_batches_that_train(double):
    run, wrapped = double_run(chunk=8), FYI(base=TINY)
    state = wrapped.start(run, wrapped.jobs(run)[0])
    for iteration in range(wrapped.steps):
        wrapped.step(run, state, iteration)
    expected = slow_condensation(TINY, run, double_pairs=True)
    torch.testing.assert_close(state.images.base.pixels.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", [Tiled(factor=2), Tiled(factor=3, bound=9)], ids=["alike", "several factors"])
def test_batches_hold_every_image_of_a_stored_one(form, double):
    run = double_run()
    state = start(replace(TINY, form=form), run)
    data = condensation.stored_set(run, state)
    assert data.size == 9
    for rows in torch.tensor([8, 0, 3, 4, 1, 7]).split(2):
        images, targets = data.fetch(rows)
        parts = [state.images.decode(row[None]).images.detach() for row in rows]
        assert torch.equal(images, torch.cat(parts))
        assert targets.tolist() == [int(row) // 3 for row, part in zip(rows, parts, strict=True) for _ in part]


def test_training_networks_leaves_no_trace_in_the_images(double):
    run = double_run()
    state = start(TINY, run)
    TINY.step(run, state, 0)
    given, pixels = state.images.pixels.grad.clone(), state.images.pixels.detach().clone()
    data = condensation.stored_set(run, state)
    images, targets = data.fetch(torch.tensor([2, 7]))
    assert not images.requires_grad
    assert torch.equal(images, pixels[[2, 7]])
    assert targets.tolist() == [0, 2]
    TINY._train(run, state, state.extras["network"], 2, 0)
    assert torch.equal(state.images.pixels.grad, given)
    assert torch.equal(state.images.pixels, pixels)
    assert all(not parameter.requires_grad for parameter in state.extras["network"].parameters())


def test_each_network_is_drawn_once_and_trained_between_its_updates(source, monkeypatch):
    drawn, trained = [], []
    network = Run.network
    monkeypatch.setattr(Run, "network", lambda self, spec, k: drawn.append(k) or network(self, spec, k))
    monkeypatch.setattr(condensation, "train", lambda *args, **rest: trained.append(args[2].epochs))
    synthesize(replace(TINY, iterations=3), source, device="cpu")
    assert drawn == [0, 0, 1, 2]  # the first to begin with, to be overwritten by a checkpoint
    assert trained == [2, 2] * 3
    trained.clear()
    synthesize(replace(TINY, ipc=1, outer_loop=None, inner_epochs=None), source, device="cpu")
    assert not trained


# Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ipc", "expected"),
    [
        *(((1, (1, 1)), (10, (10, 50)), (20, (20, 25)), (30, (30, 20)), (40, (40, 15)), (50, (50, 10)))),
        *(((2, (2, 6)), (5, (5, 23)), (15, (15, 38)), (45, (45, 12)), (51, (50, 10)), (1000, (50, 10)))),
    ],
)
def test_loops_by_budget(ipc, expected):
    assert loops(ipc) == expected
    assert DC(ipc=ipc).loops == expected
    assert DC(ipc=ipc).steps == 1000 * expected[0]
    assert DC(ipc=ipc, outer_loop=7).loops == (7, expected[1])
    assert DC(ipc=ipc, inner_epochs=3).loops == (expected[0], 3)


@pytest.mark.parametrize(("name", "rate"), [("convnet", 0.1), ("mlp", 0.01)])
def test_step_size_by_network(name, rate, source):
    method = DC(ipc=1, network=NetworkSpec(name, width=4))
    run = Run(source, torch.device("cpu"), double_run().rng, (0, 1, 2), 64)
    assert start(method, run).optimizers["images"].param_groups[0]["lr"] == rate
    assert start(replace(method, lr_images=0.3), run).optimizers["images"].param_groups[0]["lr"] == 0.3


PUBLISHED = {
    "ipc": 10,
    "form": Plain(),
    "on_small_class": "error",
    "iterations": 1000,
    "outer_loop": None,
    "inner_epochs": None,
    "init": "noise",
    "real_batch": 256,
    "lr_images": None,
    "momentum": 0.5,
    "lr_network": 0.01,
    "momentum_network": 0.0,
    "batch_size": 256,
    "distance": "layerwise",
    "labels": "hard",
    "lr_labels": 0.1,
    "network": NetworkSpec("convnet"),
    "augmentation": None,
}


def test_presets_are_the_published_settings():
    assert "cifar100/ipc10" in DC.presets
    assert "cifar100/ipc50" not in DC.presets
    for name in DC.presets:
        assert settings_of(DC.preset(name)) == PUBLISHED | {"ipc": int(name.rpartition("ipc")[2])}
    assert len(DC.presets) == 4 * 3 + 2
    assert DC.preset("cifar10/ipc10").loops == (10, 50)


def test_what_dc_and_dsa_share_is_no_method_of_its_own():
    with pytest.raises(TypeError, match="abstract"):
        GradientCondensation(ipc=1)


def test_one_class_has_no_gradient_to_match():
    alone = ImageSource("alone", ["only"], *make_images(6, 1, (3, 8, 8), seed=2))
    with pytest.raises(BadData, match=r"DC .*'alone' has one class.*DM"):
        synthesize(TINY, alone, device="cpu")


# Soft labels -------------------------------------------------------------------------------------------------


def test_soft_labels_are_learned_with_the_images(source):
    made = synthesize(replace(TINY, labels="soft", lr_labels=5.0), source, device="cpu")
    fixed = synthesize(replace(TINY, labels="soft", lr_labels=1e-9), source, device="cpu")
    assert isinstance(made.labels, SoftLabels)
    assert made.labels.classes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    before, after = (labels.target(torch.arange(9)).detach() for labels in (fixed.labels, made.labels))
    torch.testing.assert_close(before.amax(1), torch.full((9,), 0.99))
    assert float((after - before).abs().max()) > 0.01


# Networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"network": NetworkSpec(width=4, depth=1, norm="batch"), "momentum_network": 0.5},
        {"labels": "soft", "form": Tiled(factor=2)},
    ],
    ids=str,
)
def test_the_contract_is_kept_in_variants(changes, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    quick = replace(TINY, ipc=1, network=NetworkSpec(width=4, depth=1))
    assert len(check_synthesizer(replace(quick, **changes))) == 9


def test_networks_of_a_factory_are_resumed_as_well(monkeypatch):
    def factory(shape, classes):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 6), torch.nn.Tanh(), torch.nn.Linear(6, classes)
        )

    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(spec_module, "_registered", {"mine": factory})
    assert len(check_synthesizer(replace(TINY, ipc=1, network=NetworkSpec("mine")))) == 9


@pytest.mark.parametrize("method", [TINY, IDC(ipc=2)], ids=lambda one: one.title)
def test_batch_normalisation_that_cannot_be_settled_is_refused(method, monkeypatch, source):
    def factory(shape, classes):
        norm = torch.nn.BatchNorm2d(4, track_running_stats=False)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norm, torch.nn.Flatten(), torch.nn.Linear(4 * 36, classes))

    monkeypatch.setattr(spec_module, "_registered", {"mine": factory})
    with pytest.raises(InvalidSetting, match=r"DC.network = 'mine' .*track_running_stats=True"):
        replace(method, network=NetworkSpec("mine")).check(source)


def test_a_network_that_can_be_differentiated_once_is_refused(monkeypatch, source):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return slope * 2

    class Network(torch.nn.Linear):
        def __init__(self, shape, classes):
            super().__init__(192, classes)

        def forward(self, images):
            return Once.apply(super().forward(images.flatten(1)))

    monkeypatch.setattr(spec_module, "_registered", {"once": Network})
    with pytest.raises(InvalidSetting, match="second-order"):
        synthesize(replace(TINY, network=NetworkSpec("once")), source, device="cpu")


def test_noise_needs_no_real_images_to_start_from(source):
    few = source.subset([0, *range(12, 36)])
    DC(ipc=5).check(few)
    with pytest.raises(BadData, match="fewer than ipc=5 images"):
        DC(ipc=5, init="real").check(few)
