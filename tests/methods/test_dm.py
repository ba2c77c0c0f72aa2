"""DM against the formula of the paper, written as loops over classes and images in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_images
from methods.stepping import begin as start
from methods.stepping import real_images as real_batch
from methods.stepping import run_of
from methods.stepping import shown as viewed

from dsdistill import synthesize
from dsdistill.augmentations import Siamese
from dsdistill.data import ImageSource
from dsdistill.engine import Job
from dsdistill.errors import InvalidSetting
from dsdistill.matching import class_ranges
from dsdistill.methods import DM
from dsdistill.methods import dm as dm_module
from dsdistill.networks import NetworkSpec
from dsdistill.networks import spec as spec_module
from dsdistill.parameterizations import Plain, Tiled

SMALL = NetworkSpec(width=4, depth=2)
BATCHED = replace(SMALL, norm="batch")
PLAIN = DM(ipc=2, iterations=3, real_batch=4, network=SMALL, augmentation=None, lr_images=0.5)
CPU = torch.device("cpu")


def network_of(method, run, iteration):
    network = method.network.build(
        run.source.shape, run.source.num_classes, generator=run.rng.at("network", iteration, device="cpu"), device="cpu"
    )
    return copy.deepcopy(network).double().train()


def slow_loss(method, run, synthetic, iteration, *, together=False):
    """Sum over classes of the squared distance of mean features.

    Features are taken image by image; with ``together``, of all images of a side at once, as batch statistics need.
    """
    network = network_of(method, run, iteration)
    total = torch.zeros((), dtype=torch.float64)
    reals, synthetics = real_batch(method, run, iteration), synthetic
    sides = []
    for side in (reals, synthetics):
        shown = [viewed(method, run, iteration, position, images) for position, images in enumerate(side)]
        if together:
            features = torch.split(network.embed(torch.cat(shown)), [len(images) for images in shown])
        else:
            features = [torch.cat([network.embed(image[None]) for image in images]) for images in shown]
        sides.append(features)
    for real, made in zip(*sides, strict=True):
        for coordinate in (sum(real) / len(real)) - (sum(made) / len(made)):
            total = total + coordinate**2
    return total


def by_class(state, run):
    """The stored images of each class of the run as float64 leaves."""
    labels = state.labels.classes
    return [state.images.pixels.detach()[labels == c].double().requires_grad_() for c in run.classes]


def expected(method, run, state, iteration, **options):
    """Loss and gradient by the formula."""
    leaves = by_class(state, run)
    loss = slow_loss(method, run, leaves, iteration, **options)
    gradient = torch.cat(torch.autograd.grad(loss, leaves))
    return loss.detach(), gradient


def check_step(method, run, **options):
    """One step from the start: its loss, gradient and update are those of the formula."""
    state = start(method, run)
    loss, gradient = expected(method, run, state, 0, **options)
    before = state.images.pixels.detach().clone()
    metrics = method.step(run, state, 0)
    assert float(loss) > 1e-3
    torch.testing.assert_close(metrics["loss"].double(), loss, rtol=1e-5, atol=0)
    assert not metrics["loss"].requires_grad
    scale = float(gradient.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(state.images.pixels.grad.double(), gradient, rtol=1e-3, atol=2e-5 * scale)
    moved = before.double() - method.lr_images * gradient
    torch.testing.assert_close(state.images.pixels.detach().double(), moved, rtol=1e-5, atol=1e-4 * scale)


# Loss and gradient -------------------------------------------------------------------------------------------


def test_the_step_is_that_of_the_formula(source):
    check_step(PLAIN, run_of(source))


@pytest.mark.parametrize("op", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_a_class_shares_its_view_with_its_real_images(op, source):
    check_step(replace(PLAIN, augmentation=Siamese((op,))), run_of(source))


@pytest.mark.parametrize("seed", range(4))
def test_views_of_all_kinds_may_meet(seed, source):
    check_step(replace(PLAIN, augmentation=Siamese()), run_of(source, seed=seed))


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec("mlp", width=8),
        NetworkSpec(width=4, depth=1, norm="none", pooling="max"),
        NetworkSpec(width=4, depth=1, norm="layer", activation="swish"),
        NetworkSpec(width=4, depth=1, norm="group"),
    ],
    ids=str,
)
def test_any_network_without_batch_statistics_will_do(spec, source):
    check_step(replace(PLAIN, network=spec), run_of(source, chunk=2))


def test_the_loss_is_a_sum_over_coordinates_and_classes(source):
    """Halving the classes halves nothing else: the loss of a pair of classes is the sum of the losses of each."""
    method = replace(PLAIN, real_batch=12)  # all there are, so that no job draws others
    everything, losses, gradients = start(method, run_of(source)), [], []
    for classes in ((0,), (2,), (0, 2)):
        run = run_of(source, classes=classes)
        state = start(method, run)
        mine = torch.isin(everything.labels.classes, torch.tensor(classes))
        state.images.pixels.data.copy_(everything.images.pixels.data[mine])
        losses.append(float(method.step(run, state, 0)["loss"]))
        gradients.append(state.images.pixels.grad)
    assert min(losses) > 1e-3
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-5)
    scale = float(gradients[2].abs().max())
    torch.testing.assert_close(gradients[2], torch.cat(gradients[:2]), rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("classes", [(0,), (2, 0), (1, 2)])
def test_a_job_of_some_classes_in_any_order(classes, source):
    check_step(replace(PLAIN, augmentation=Siamese()), run_of(source, classes=classes, chunk=3))


def test_grey_oblong_images(source):
    grey = ImageSource("grey", ["a", "b"], *make_images(6, 2, (1, 10, 6), seed=2))
    check_step(replace(PLAIN, augmentation=Siamese()), run_of(grey))


def test_one_class_works():
    alone = ImageSource("alone", ["only"], *make_images(6, 1, (3, 8, 8), seed=2))
    check_step(PLAIN, run_of(alone))
    assert synthesize(replace(PLAIN, augmentation=Siamese()), alone).targets == [0, 0]


@pytest.mark.parametrize("augmentation", [None, Siamese()], ids=["plain", "views"])
@pytest.mark.parametrize("spec", [SMALL, BATCHED], ids=["instance", "batch"])
def test_the_real_batch_itself_has_no_loss_and_no_gradient(spec, augmentation, source):
    method = replace(PLAIN, ipc=4, network=spec, augmentation=augmentation)
    run = run_of(source)
    state = start(method, run)
    state.images.pixels.data.copy_(torch.cat(real_batch(method, run, 5)))
    assert float(method.step(run, state, 5)["loss"]) == 0
    assert float(state.images.pixels.grad.abs().max()) == 0


def test_the_real_batch_itself_leaves_only_rounding_when_chunks_differ(source):
    method = replace(PLAIN, ipc=4)
    run = run_of(source, chunk=3)
    state = start(method, run)
    state.images.pixels.data.copy_(torch.cat(real_batch(method, run, 5)))
    assert float(method.step(run, state, 5)["loss"]) < 1e-10
    assert float(state.images.pixels.grad.abs().max()) < 1e-5


# Which real images -------------------------------------------------------------------------------------------


def test_a_batch_larger_than_a_class_takes_all_of_it(source):
    uneven = source.subset([*range(3), *range(12, 36)])
    method = replace(PLAIN, real_batch=100)
    run = run_of(uneven)
    assert [len(images) for images in real_batch(method, run, 0)] == [3, 12, 12]
    check_step(method, run)
    state = start(method, run)
    network = network_of(method, run, 0)
    loss = 0.0
    for label, leaf in zip(range(3), by_class(state, run), strict=True):
        everything = uneven.normalization.standardize(uneven.images[uneven.targets == label]).double()
        loss += float((network.embed(everything).mean(0) - network.embed(leaf).mean(0)).square().sum().detach())
    assert float(method.step(run, state, 0)["loss"]) == pytest.approx(loss, rel=1e-5)


def test_uneven_batches_are_means_and_not_sums(source):
    uneven = source.subset([*range(3), *range(12, 36)])
    check_step(replace(PLAIN, real_batch=5), run_of(uneven, chunk=4))


def test_each_step_draws_anew(source):
    run = run_of(source)
    first, second = (torch.cat(real_batch(PLAIN, run, iteration)) for iteration in (0, 1))
    assert not torch.equal(first, second)
    state = start(PLAIN, run)
    losses = []
    for iteration in (0, 1):
        loss, _ = expected(PLAIN, run, state, iteration)
        frozen = copy.deepcopy(state)
        frozen.optimizers = {"images": torch.optim.SGD(frozen.images.parameters(), lr=0.1)}
        assert float(PLAIN.step(run, frozen, iteration)["loss"]) == pytest.approx(float(loss), rel=1e-5)
        losses.append(float(loss))
    assert losses[0] != losses[1]


def test_synthetic_images_start_as_distinct_real_ones(source):
    state = start(PLAIN, run_of(source))
    real = source.normalization.standardize(source.images)
    places = [int((real == image).flatten(1).all(1).nonzero().flatten()[0]) for image in state.images.pixels.detach()]
    assert len(set(places)) == 6
    assert source.targets[places].tolist() == state.labels.classes.tolist() == [0, 0, 1, 1, 2, 2]


# Chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_chunks_change_nothing(chunk, source):
    check_step(replace(PLAIN, augmentation=Siamese()), run_of(source, chunk=chunk))


def record_sizes(monkeypatch, sizes):
    """Note how many images pass the network at a time."""
    embed = dm_module.embed
    monkeypatch.setattr(dm_module, "embed", lambda network, images: sizes.append(len(images)) or embed(network, images))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("form", [Plain(), Tiled(factor=2)], ids=["pixels", "tiles"])
def test_a_class_too_large_to_pass_at_once_is_split(form, chunk, source, monkeypatch):
    method = replace(PLAIN, augmentation=Siamese(), ipc=9, form=form, on_small_class="duplicate")
    run, sizes = run_of(source, chunk=chunk), []
    whole = start(method, run)
    metrics = method.step(run_of(source), whole, 0)
    embedded = dm_module.embed
    monkeypatch.setattr(
        dm_module, "embed", lambda network, images: sizes.append(len(images)) or embedded(network, images)
    )
    split = start(method, run)
    torch.testing.assert_close(method.step(run, split, 0)["loss"], metrics["loss"], rtol=1e-5, atol=0)
    gradient = whole.images.pixels.grad
    torch.testing.assert_close(split.images.pixels.grad, gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()))
    assert max(sizes) <= max(chunk, int(split.images.multiplicity.max()))


def test_dropout_is_off_so_that_chunks_change_nothing(source, monkeypatch):
    class Dropping(torch.nn.Sequential):
        def __init__(self, shape, classes):
            hidden = torch.nn.Linear(192, 8), torch.nn.Dropout(0.5)
            super().__init__(torch.nn.Flatten(), *hidden, torch.nn.Linear(8, classes))

    monkeypatch.setattr(spec_module, "_registered", {"dropping": Dropping})
    method = replace(PLAIN, ipc=9, network=NetworkSpec("dropping"))
    states = []
    for chunk in (1, 1000):
        run = run_of(source, chunk=chunk)
        states.append(start(method, run))
        method.step(run, states[-1], 0)
    gradient = states[1].images.pixels.grad
    assert float(gradient.abs().max()) > 0
    torch.testing.assert_close(states[0].images.pixels.grad, gradient, rtol=1e-4, atol=1e-7)


def test_a_class_of_a_few_chunks_is_not_split(source, monkeypatch):
    method, sizes = replace(PLAIN, ipc=8, real_batch=1), []
    run = run_of(source, chunk=2)
    embedded = dm_module.embed
    monkeypatch.setattr(
        dm_module, "embed", lambda network, images: sizes.append(len(images)) or embedded(network, images)
    )
    method.step(run, start(method, run), 0)
    assert sizes == [2, 1, 8, 8, 8]  # the real images, then each class as a whole


@pytest.mark.parametrize("chunk", [1, 4, 6, 1000])
def test_chunks_change_nothing_where_classes_differ_in_size(chunk, source):
    uneven = source.subset([*range(2), *range(12, 13), *range(24, 36)])
    method = replace(PLAIN, ipc=5, on_small_class="cap", augmentation=Siamese())
    run = run_of(uneven, chunk=chunk)
    assert method.random_real(run)[1].classes.tolist() == [0, 0, 1, 2, 2, 2, 2, 2]
    check_step(method, run)


@pytest.mark.parametrize(
    ("budget", "chunk", "ranges"),
    [
        ((2, 2, 2), 1, [(0, 1), (1, 2), (2, 3)]),
        ((2, 2, 2), 3, [(0, 1), (1, 2), (2, 3)]),
        ((2, 2, 2), 4, [(0, 2), (2, 3)]),
        ((2, 2, 2), 6, [(0, 3)]),
        ((2, 1, 5), 3, [(0, 2), (2, 3)]),
        ((2, 1, 5), 7, [(0, 2), (2, 3)]),
        ((2, 1, 5), 8, [(0, 3)]),
        ((1,), 1, [(0, 1)]),
    ],
)
def test_ranges_of_classes_fill_a_chunk_and_never_split_a_class(budget, chunk, ranges):
    assert [(part.start, part.stop) for part in class_ranges(torch.tensor(budget), chunk)] == ranges


# Batch normalisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("augmentation", [None, Siamese()], ids=["plain", "views"])
def test_batch_normalisation_sees_each_side_whole(augmentation, chunk, source):
    method = replace(PLAIN, network=BATCHED, augmentation=augmentation)
    check_step(method, run_of(source, chunk=chunk), together=True)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_batch_normalisation_with_classes_of_different_size(chunk, source):
    uneven = source.subset([*range(2), *range(12, 13), *range(24, 36)])
    method = replace(PLAIN, network=BATCHED, ipc=5, on_small_class="cap", augmentation=Siamese())
    run = run_of(uneven, chunk=chunk)
    assert method.random_real(run)[1].classes.tolist() == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [len(images) for images in real_batch(method, run, 0)] == [2, 1, 4]
    check_step(method, run, together=True)


def test_batch_statistics_of_single_classes_would_be_something_else(source):
    method = replace(PLAIN, network=BATCHED)
    run = run_of(source, chunk=2)
    state = start(method, run)
    apart = 0.0
    for real, made in zip(real_batch(method, run, 0), by_class(state, run), strict=True):
        network = network_of(method, run, 0)
        apart += float((network.embed(real).mean(0) - network.embed(made).mean(0)).square().sum().detach())
    together = float(method.step(run, state, 0)["loss"])
    assert abs(apart - together) > 0.01 * together


# Views -------------------------------------------------------------------------------------------------------


def made_by(method, source, **options):
    return synthesize(method, source, device="cpu", progress=False, **options).tensors()[0]


def test_flips_are_left_out_where_they_change_the_class(source):
    flips, plain = replace(PLAIN, augmentation=Siamese(("flip",))), PLAIN
    unsafe = source.with_mirror_safe(False)
    assert torch.equal(made_by(flips, unsafe), made_by(plain, unsafe))
    assert not torch.equal(made_by(flips, source), made_by(plain, source))
    both, rest = (replace(PLAIN, augmentation=Siamese(ops)) for ops in (("flip", "crop"), ("crop",)))
    assert torch.equal(made_by(both, unsafe), made_by(rest, unsafe))
    assert not torch.equal(made_by(both, source), made_by(rest, source))


def test_only_the_operations_listed_are_used(source, monkeypatch):
    seen = []
    real = Siamese._transform
    monkeypatch.setattr(Siamese, "_transform", lambda self, op, *rest: seen.append(op) or real(self, op, *rest))
    made_by(replace(PLAIN, iterations=12, augmentation=Siamese(("crop", "flip", "cutout"))), source)
    assert set(seen) == {"crop", "flip", "cutout"}
    seen.clear()
    made_by(PLAIN, source)
    assert not seen


# The update --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.5), (0.3, 0.0), (0.2, 0.9)])
def test_updates_are_sgd_with_momentum_and_nothing_else(lr, momentum, source):
    method = replace(PLAIN, lr_images=lr, momentum=momentum, iterations=2)
    run = run_of(source)
    state = start(method, run)
    position = state.images.pixels.detach().double()
    speed = torch.zeros_like(position)
    for iteration in range(2):
        _, gradient = expected(method, run, state, iteration)
        speed = momentum * speed + gradient
        position = position - lr * speed
        method.step(run, state, iteration)
        torch.testing.assert_close(state.images.pixels.detach().double(), position, rtol=1e-5, atol=1e-4)
    made = made_by(method, source)
    run = run.scoped(Job("all", run.classes))
    state = start(method, run)
    for iteration in range(2):
        method.step(run, state, iteration)
    assert torch.equal(made, state.images.pixels.detach())  # the engine adds nothing and saves the last update


def test_real_images_and_networks_get_no_gradient(source):
    run = run_of(source)
    state = start(PLAIN, run)
    images = source.images.clone()
    PLAIN.step(run, state, 0)
    assert all(parameter.grad is None for network in run._networks.values() for parameter in network.parameters())
    assert torch.equal(source.images, images)
    assert state.labels.classes.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_distance_falls_from_noise(source):
    method = replace(PLAIN, real_batch=12, lr_images=10.0, network=NetworkSpec(width=8, depth=2, norm="none"))
    run = run_of(source)
    state = start(method, run)
    state.images.pixels.data.normal_(generator=torch.Generator().manual_seed(0))
    losses = [float(method.step(run, state, iteration)["loss"]) for iteration in range(60)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


# Settings ----------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones():
    method = DM()
    assert (method.ipc, method.iterations, method.real_batch) == (10, 20_000, 256)
    assert (method.lr_images, method.momentum) == (1.0, 0.5)
    assert method.network == NetworkSpec("convnet")
    assert method.augmentation == Siamese(("color", "crop", "cutout", "flip", "scale", "rotate"))
    assert method.steps == 20_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 0),
        ("real_batch", 0),
        ("lr_images", 0.0),
        ("lr_images", float("nan")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("network", "convnet"),
        ("augmentation", "dsa"),
        ("on_small_class", "ignore"),
        ("ipc", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InvalidSetting, match=rf"DM\.{field} = "):
        DM(**{field: value})
