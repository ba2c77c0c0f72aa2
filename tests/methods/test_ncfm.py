"""NCFM against the formula of the paper: complex exponentials, class by class, in float64."""

import copy
import importlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods.condensing import DoubleSource
from methods.stepping import begin, real_images, run_of
from torch.nn import functional as F

from dsdistill import synthesize
from dsdistill.augmentations import CutMix, always_flip_color_cutout
from dsdistill.data import ImageSource, whiten
from dsdistill.errors import BadData, InvalidSetting, UnknownName
from dsdistill.experts import Pool
from dsdistill.matching import characteristic
from dsdistill.methods import NCFM
from dsdistill.methods import ncfm as module
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Mirrored, Plain, Tiled
from dsdistill.testing import check_synthesizer
from dsdistill.training import TrainingRecipe

SMALL = NetworkSpec(width=4, depth=2)
BATCHED = replace(SMALL, norm="batch")
BRIEF = TrainingRecipe(epochs=2, batch_size=9, lr=0.05)
PLAIN = NCFM(
    ipc=2,
    iterations=3,
    real_batch=4,
    frequencies=8,
    networks=2,
    pretraining=BRIEF,
    network=SMALL,
    form=Plain(),
    augmentation=None,
)
VIEWED = replace(PLAIN, augmentation=always_flip_color_cutout(("flip", "color", "crop", "cutout")))
TILED = replace(VIEWED, form=Tiled(factor=2))
LEARNED = replace(VIEWED, sampling="network")
MIXED = replace(VIEWED, sampling="mixture", frequencies=40)


# The formula -------------------------------------------------------------------------------------------------


def drawn(method, run, iteration):
    """Which network of the pool, and the weight of its initial self."""
    generator = run.rng.at("network", iteration, device="cpu")
    return int(torch.randint(method.networks, (), generator=generator)), float(torch.rand((), generator=generator))


def networks_of(method, run, iteration):
    """The mixed and the trained network of a step, in float64."""
    which, share = drawn(method, run, iteration)
    pool = Pool.of(run, method.network, method.pretraining, method.networks)
    return tuple(copy.deepcopy(network).double() for network in (pool.mix(which, share), pool.final(which)))


def psi_of(state):
    psi = state.extras.get("psi")
    return None if psi is None else copy.deepcopy(psi).double()


def frequencies_of(method, run, iteration, psi, width):
    generator, count = run.rng.at("frequencies", iteration), method._count
    if psi is None:
        return torch.randn(count, width, generator=generator).double()
    if method.sampling == "network":
        return psi(torch.randn(count, width, generator=generator).double())
    scales = psi(torch.randn(-(-count // 16), width, generator=generator).double())
    normal = torch.randn(count, width, generator=generator).double()
    return torch.stack([scales[row // 16] * normal[row] for row in range(count)])


def viewed(method, rng, run, iteration, position, images):
    suited = method.augmentation.suited(run.source.mirror_safe) if method.augmentation else None
    if suited is None:
        return images
    record = suited.sample(len(run.classes), run.source.shape, rng.at("views", iteration, device="cpu"), per="class")
    return torch.cat([suited.apply(image[None], record, [position]) for image in images])


def features(network, sides, together):
    """Unit features of the images of each class, image by image, or of a side at once as batch statistics need."""
    if together:
        return F.normalize(network.embed(torch.cat(sides))).split([len(images) for images in sides])
    return [torch.cat([F.normalize(network.embed(image[None])) for image in images]) for images in sides]


def slow_losses(method, run, decoded, iteration, psi=None, *, together=False):
    """The two sums of the formula, given the decoded images of each class."""
    mixed, final = networks_of(method, run, iteration)
    reals = real_images(method, run, iteration)
    sides = [[viewed(method, run.rng, run, iteration, *pair) for pair in enumerate(side)] for side in (reals, decoded)]
    reals, synthetics = (features(mixed, side, together) for side in sides)
    frequencies = frequencies_of(method, run, iteration, psi, reals[0].shape[1])
    distance = torch.zeros((), dtype=torch.float64)
    for real, synthetic in zip(reals, synthetics, strict=True):
        r, s = (torch.exp(1j * (v @ frequencies.T)).mean(0) for v in (real, synthetic))
        turned = 2 * (r.abs() * s.abs() - (r * s.conj()).real)
        distance = distance + 300 * (method.alpha * (r.abs() - s.abs()) ** 2 + method.beta * turned).sqrt().mean()
    own = run.rng.within("calibration")
    shown = [viewed(method, own, run, iteration, *pair) for pair in enumerate(decoded)]
    logits = final(torch.cat(shown)).split([len(images) for images in shown])
    calibration = torch.zeros((), dtype=torch.float64)
    for label, each in zip(run.classes, logits, strict=True):
        calibration = calibration - method.calibration * F.log_softmax(each, 1)[:, label].mean()
    return distance, calibration


def expected(method, run, state, iteration, **options):
    """Losses, and the gradients in the stored pixels and in ψ."""
    images = copy.deepcopy(state.images).double()
    decoded, owner = images.decode()
    by_class = [decoded[state.labels.classes[owner] == label] for label in run.classes]
    psi = psi_of(state)
    distance, calibration = slow_losses(method, run, by_class, iteration, psi, **options)
    (pixels,) = images.parameters()
    (gradient,) = torch.autograd.grad(distance + calibration, pixels, retain_graph=True)
    learned = torch.autograd.grad(distance, list(psi.parameters())) if psi is not None else ()
    return distance.detach(), calibration.detach(), gradient, learned


def check_step(method, run, *, state=None, iteration=0, **options):
    """A step has the losses and gradients of the formula; returns the state after it."""
    state = begin(method, run) if state is None else state
    distance, calibration, gradient, learned = expected(method, run, state, iteration, **options)
    before = [parameter.detach().clone() for parameter in state.extras["psi"].parameters()] if learned else []
    metrics = method.step(run, state, iteration)
    torch.testing.assert_close(metrics["loss"].double(), distance, rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["calibration"].double(), calibration, rtol=1e-5, atol=0)
    assert float(distance) > 0.1
    (pixels,) = state.images.parameters()
    found = pixels.grad.double() * torch.tensor(run.source.normalization.std)[:, None, None]  # unit_step divided by it
    # As a whole: at the kink of an activation single entries of float32 may fall on the other side.
    assert float((found - gradient).norm() / gradient.norm()) < 5e-3
    after = state.extras["psi"].parameters() if learned else []
    for old, new, slope in zip(before, after, learned, strict=True):  # uphill
        scale = max(float(one.abs().max()) for one in learned)  # biases in front of a batch norm have none of their own
        torch.testing.assert_close(-new.grad.double(), slope, rtol=2e-2, atol=2e-3 * scale)
        torch.testing.assert_close(new.detach() - old, -method.lr_sampling * new.grad, rtol=1e-3, atol=1e-7)
    return state


@pytest.mark.parametrize("method", [PLAIN, VIEWED, TILED, LEARNED, MIXED], ids=["plain", "viewed", "tiled", "ψ", "mix"])
def test_the_step_is_that_of_the_formula(method, source):
    check_step(method, run_of(source, chunk=5))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.2, 0.8), (0.99, 0.01)], ids=str)
def test_amplitude_and_phase_have_weights(weights, source):
    alpha, beta = weights
    check_step(replace(LEARNED, alpha=alpha, beta=beta), run_of(source))


@pytest.mark.parametrize("method", [VIEWED, TILED, LEARNED], ids=["viewed", "tiled", "ψ"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(method, chunk, source):
    check_step(replace(method, ipc=6, on_small_class="duplicate"), run_of(source, chunk=chunk))


@pytest.mark.parametrize("method", [VIEWED, LEARNED], ids=["viewed", "ψ"])
def test_batch_normalisation_sees_each_side_whole(method, source):
    check_step(replace(method, network=BATCHED), run_of(source, chunk=2), together=True)


def test_classes_may_differ_in_size_and_a_small_one_gives_all_it_has(source):
    uneven = source.subset([*range(3), *range(12, 14), *range(24, 36)])
    method = replace(TILED, sampling="network", ipc=3, on_small_class="cap", real_batch=100)
    run = run_of(uneven, chunk=2)
    assert [len(images) for images in real_images(method, run, 0)] == [3, 2, 12]
    assert begin(method, run).labels.classes.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    check_step(method, run)


def test_mirrored_pairs_are_matched_as_pairs(source):
    run = run_of(source)
    state = begin(TILED, run)
    state.images = Mirrored(state.images)
    assert len(state.images.decode().images) == 2 * 4 * 6
    check_step(TILED, run, state=state)


def test_each_step_sees_the_pixels_that_the_last_one_left(source):
    run = run_of(source)
    state, iterations = None, (0, 1, 3)
    assert {drawn(TILED, run, iteration)[0] for iteration in iterations} == {0, 1}  # of both networks of the pool
    for iteration in iterations:
        state = check_step(TILED, run, state=state, iteration=iteration)


def test_the_mixture_gives_sixteen_frequencies_the_same_scales(source):
    run = run_of(source)
    state = begin(MIXED, run)
    width = Pool.of(run, SMALL, BRIEF, 2).width
    generator = run.rng.at("frequencies", 0)
    torch.randn(3, width, generator=generator)
    normal = torch.randn(40, width, generator=generator)
    scales = (MIXED._frequencies(run, state, 0, width) / normal).detach()
    assert scales.shape == (40, width)
    for first in (0, 16, 32):
        torch.testing.assert_close(scales[first : first + 16], scales[first].expand(len(scales[first:][:16]), -1))
    assert float(scales.abs().max()) < 1
    assert float((scales[0] - scales[16]).abs().max()) > 0.01


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3)], ids=str)
def test_the_real_batch_itself_is_at_no_distance(weights, copies, source, double):
    alpha, beta = weights
    method = replace(VIEWED, ipc=4 * copies, calibration=0.0, alpha=alpha, beta=beta)
    run = run_of(DoubleSource("toy", source.classes, source.images, source.targets))
    state = begin(method, run)
    batch = torch.cat([images.repeat(copies, 1, 1, 1) for images in real_images(method, run, 5)])
    state.images.pixels.data.copy_(batch)
    assert float(method.step(run, state, 5)["loss"]) / 3 <= 300 * 1e-6  # of each class: the floor of the root, if any
    if copies == 1:
        assert float(state.images.pixels.grad.abs().max()) < 1e-6
    else:
        assert float(method.step(run, state, 6)["loss"]) > 1  # of other real images


@pytest.mark.parametrize("method", [LEARNED, MIXED], ids=["network", "mixture"])
def test_the_sampling_network_moves_uphill(method, source):
    run = run_of(source)
    method = replace(method, lr_sampling=1e-5)
    state = begin(method, run)
    images = state.images.pixels.detach().double()
    before, calm = psi_of(state), [images[state.labels.classes == label] for label in run.classes]
    method.step(run, state, 0)
    low, high = (float(slow_losses(method, run, calm, 0, psi)[0].detach()) for psi in (before, psi_of(state)))
    assert high > low * 1.0002


# Real images, networks ---------------------------------------------------------------------------------------


def test_a_step_draws_its_real_images_from_all_of_their_class(source, monkeypatch):
    run = run_of(source)
    PLAIN.prepare(run)
    state, taken, ever, gather = begin(PLAIN, run), [], set(), ImageSource.gather
    monkeypatch.setattr(ImageSource, "gather", lambda self, rows: taken.extend(rows.tolist()) or gather(self, rows))
    for iteration in range(20):
        taken.clear()
        PLAIN.step(run, state, iteration)
        assert source.targets[taken].bincount().tolist() == [4, 4, 4]
        assert len(set(taken)) == 12
        ever |= set(taken)
    assert ever == set(range(36))


def test_networks_of_the_pool_are_drawn_uniformly_and_mixed_at_random(source, monkeypatch):
    method, run = replace(PLAIN, networks=4, calibration=0.0), run_of(source)
    state, mix, final = begin(method, run), Pool.mix, Pool.final
    method.prepare(run)
    mixed, trained = [], []
    monkeypatch.setattr(Pool, "mix", lambda self, *draw: mixed.append(draw) or mix(self, *draw))
    monkeypatch.setattr(Pool, "final", lambda self, which: trained.append(which) or final(self, which))
    monkeypatch.setattr(module, "match_characters", lambda *_, **__: (torch.zeros(()), None))
    for iteration in range(400):
        method.step(run, state, iteration)
    assert trained == [which for which, _ in mixed]
    counts = torch.tensor(trained).bincount(minlength=4)
    shares = torch.tensor([share for _, share in mixed])
    assert len(counts) == 4
    assert int(counts.min()) > 60
    assert abs(float(shares.mean()) - 0.5) < 0.06
    assert float(shares.min()) < 0.05 < 0.95 < float(shares.max())


def watch_embed(monkeypatch, note):
    """Call ``note`` with the images of every pass through a network that looks at them."""
    embed = characteristic.embed
    monkeypatch.setattr(characteristic, "embed", lambda network, images: note(images) or embed(network, images))


def test_no_more_images_pass_the_network_than_a_chunk(source, monkeypatch):
    sizes = []
    watch_embed(monkeypatch, lambda images: sizes.append(len(images)))
    run = run_of(source, chunk=3)
    LEARNED.step(run, begin(LEARNED, run), 0)
    assert max(sizes) == 3
    assert sum(sizes) == 12 + 6  # each image once: frequencies learn of the real ones without a second look


@pytest.mark.parametrize(
    ("usual", "chunk", "held"),
    [(2, 2, 32), (2, 60, 60), (8, 8, 100), (8, 4, 4), (1, 1, 1)],
)
def test_a_graph_holds_several_chunks_and_one_where_it_is_smaller_than_usual(usual, chunk, held, source, monkeypatch):
    """So a chunk halved when memory ran out helps. A class is 100 images."""
    monkeypatch.setattr(characteristic, "default_chunk", lambda shape, device: usual)
    held_now, most, backward = [0], [0], torch.Tensor.backward

    def note(images):
        held_now[0] += len(images) * images.requires_grad
        most[0] = max(most[0], held_now[0])

    def freed(tensor, *rest):
        backward(tensor, *rest)
        held_now[0] = 0

    watch_embed(monkeypatch, note)
    monkeypatch.setattr(torch.Tensor, "backward", freed)
    method = replace(PLAIN, ipc=100, on_small_class="duplicate", calibration=0.0)
    run = run_of(source, chunk=chunk)
    method.step(run, begin(method, run), 0)
    assert most == [held]


def test_the_pool_is_trained_before_the_first_step_and_once(source, monkeypatch):
    trained = []
    before = Pool.__init__
    monkeypatch.setattr(Pool, "__init__", lambda self, *rest: (trained.append(rest[1:]), before(self, *rest))[1])
    synthesize(PLAIN, source, device="cpu", progress=False)
    assert trained == [(SMALL, BRIEF, 2)]


# The update --------------------------------------------------------------------------------------------------


def unit_pixels(state, source):
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (source.normalization.mean, source.normalization.std)
    )
    return state.images.pixels.detach() * std + mean


def test_one_step_of_adamw_moves_every_pixel_by_its_step_size_and_none_of_other_classes_again(source):
    run = run_of(source)
    method = replace(PLAIN, lr_images=0.002)
    state = begin(method, run)
    before = unit_pixels(state, source)
    gradient = expected(method, run, state, 0)[2]
    method.step(run, state, 0)
    moved = unit_pixels(state, source) - before
    clear = (gradient.abs() > 1e-3 * gradient.abs().max()) & (before > 0.01) & (before < 0.99)
    assert float(clear.float().mean()) > 0.5
    torch.testing.assert_close(moved[clear], -0.002 * gradient.sign().float()[clear], rtol=0, atol=2e-6)


def test_pixels_stay_between_black_and_white(source):
    run = run_of(source)
    method = replace(PLAIN, lr_images=0.5)
    state = begin(method, run)
    for iteration in range(2):
        method.step(run, state, iteration)
    pixels = unit_pixels(state, source)
    assert float(pixels.min()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.max()) == pytest.approx(1, abs=1e-6)


def test_pixels_without_gradient_do_not_fade(source):
    """Without weights there is nothing to learn from: no decay may move a pixel."""
    run = run_of(source)
    method = replace(PLAIN, calibration=0.0, network=NetworkSpec(width=4, depth=1, norm="none", activation="relu"))
    state = begin(method, run)
    pool = Pool.of(run, method.network, method.pretraining, method.networks)
    for weights in pool._weights:
        for one in weights:
            one.zero_()
    before = state.images.pixels.detach().clone()
    method.step(run, state, 0)
    torch.testing.assert_close(state.images.pixels.detach(), before, rtol=0, atol=1e-6)
    faded = replace(method, weight_decay=0.1, lr_images=0.1)
    state = begin(faded, run)
    faded.step(run, state, 0)
    assert float((state.images.pixels.detach() - before).abs().max()) > 1e-3


def test_sgd_has_momentum(source):
    run = run_of(source)
    method = replace(PLAIN, optimizer="sgd", lr_images=1e-4, momentum=0.5)
    state, speed = begin(method, run), 0.0
    std = torch.tensor(source.normalization.std)[:, None, None]
    for iteration in range(2):
        before = unit_pixels(state, source)
        speed = 0.5 * speed + expected(method, run, state, iteration)[2] / std
        method.step(run, state, iteration)
        moved = (unit_pixels(state, source) - before).double()
        inside = (before > 0.02) & (before < 0.98)
        scale = float(speed.abs().max())
        torch.testing.assert_close(moved[inside], -1e-4 * speed[inside], rtol=1e-2, atol=1e-4 * 1e-2 * scale + 1e-6)


def test_the_step_size_is_halved_where_the_loss_no_longer_falls(source):
    method = replace(PLAIN, iterations=60, patience=3, lr_images=1e-6)
    run = run_of(source)
    state, losses = begin(method, run), []
    twin = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-6)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(twin, factor=0.5, patience=3)
    for iteration in range(60):
        losses.append(sum(float(value) for value in method.step(run, state, iteration).values()) / 3)
        if iteration % 20 == 19:  # they are read in groups
            for loss in losses[-20:]:
                plateau.step(loss)
        assert state.optimizers["images"].param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    assert twin.param_groups[0]["lr"] < 2e-7
    assert "plateau" not in begin(replace(method, patience=None), run).extras


def test_a_run_stopped_between_two_looks_at_the_losses_ends_in_the_same_bytes(source, tmp_path):
    method = replace(LEARNED, iterations=44, patience=1, network=NetworkSpec(width=4, depth=1))

    def stop(event):
        if event.iteration == 29:
            raise KeyboardInterrupt

    whole = synthesize(method, source, device="cpu", progress=False)
    with pytest.raises(KeyboardInterrupt):
        synthesize(
            method, source, device="cpu", progress=False, out=tmp_path / "run", checkpoint_every=7, callback=stop
        )
    assert len(list((tmp_path / "run" / "run" / "shared").iterdir())) == 2  # the pool is not trained again
    made = synthesize(method, source, device="cpu", progress=False, out=tmp_path / "run")
    assert torch.equal(made.images.pixels, whole.images.pixels)
    assert not (tmp_path / "run" / "run" / "shared").exists()


def test_the_distance_falls(source):
    method = replace(TILED, real_batch=12, frequencies=64, lr_images=0.02, calibration=0.0, augmentation=None)
    run = run_of(source)
    state = begin(method, run)
    losses = [float(method.step(run, state, iteration)["loss"]) for iteration in range(60)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


# Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "mixture", "frequencies": 17},
        {"network": BATCHED, "sampling": "network", "form": Tiled(factor=2)},
        {"alpha": 0.9, "beta": 0.1, "optimizer": "sgd"},
    ],
    ids=str,
)
def test_the_contract_is_kept_in_all_variants(changes):
    assert len(check_synthesizer(replace(PLAIN, ipc=1, networks=1, **changes))) == 9


def test_defaults_and_presets_are_the_published_settings():
    method = NCFM()
    assert (method.iterations, method.real_batch, method._count, method.networks) == (20_000, 1024, 4096, 20)
    assert (method.optimizer, method.lr_images, method.alpha, method.beta) == ("adamw", 1e-3, 0.5, 0.5)
    assert (method.calibration, method.patience, method.form) == (1.0, 500, Tiled(factor=2))
    rates = [method.pretraining.learning_rate(epoch) for epoch in (0, 39, 40, 49, 50, 59)]
    assert rates == pytest.approx([0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004])
    assert method.pretraining.augmentation == always_flip_color_cutout(("color", "crop"))
    assert [stage.ops for stage in method.pretraining.augmentation.stages] == [("color",), ("crop",)]
    assert method.pretraining.mix == CutMix(probability=0.5)
    assert NCFM.preset("cifar10/ipc10") == NCFM(ipc=10)
    assert NCFM.preset("cifar100/ipc10") == NCFM(ipc=10, optimizer="sgd", lr_images=0.01, momentum=0.5)
    assert NCFM.preset("imagenet_nette/ipc1").pretraining.epochs == 80
    assert NCFM.preset("tiny_imagenet/ipc50/network")._count == 1024
    assert len(NCFM.presets) == 3 * (9 + 12)
    with pytest.raises(UnknownName, match="cifar10/ipc10"):
        NCFM.preset("cifar10/ipc11")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0, "beta": 0.0}, "alpha or beta"),
        ({"sampling": "mixture", "frequencies": 16}, "2 components"),
        ({"frequencies": 1}, r"NCFM\.frequencies"),
        ({"networks": 0}, r"NCFM\.networks"),
        ({"patience": 0}, r"NCFM\.patience"),
        ({"sampling": "uniform"}, r"NCFM\.sampling"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InvalidSetting, match=message):
        NCFM(**changes)


def test_whitened_images_are_refused(source):
    with pytest.raises(BadData, match="NCFM keeps pixels"):
        NCFM(ipc=1).check(whiten(source))


def test_the_benchmark_compares_like_with_like(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    ncfm_step = importlib.import_module("benchmarks.speed.ncfm_step")
    options = Namespace(classes=2, per_class=5, ipc=1, real_batch=2, seed=0, device="cpu", networks=2, frequencies=16)
    found = ncfm_step.check(options, torch.float64, iterations=2)
    assert [one.quantity for one in found] == ["loss", "calibration", "gradient, largest", "gradient, median image"]
    assert all(one.relative < 1e-10 for one in found)
    ncfm_step.loops(options)()
