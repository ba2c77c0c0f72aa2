"""Gradient matching against the formula, written as loops over classes and images in float64."""

from dataclasses import replace

import pytest
import torch
from conftest import make_images
from torch import nn
from torch.nn.functional import cross_entropy

from dsdistill.augmentations import Siamese
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, State, frozen
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.matching import ClassViews, match_gradients, matched_weights, settle_batchnorm
from dsdistill.networks import NetworkSpec
from dsdistill.objectives import layerwise_cosine, squared_error
from dsdistill.parameterizations import Mirrored, Pixels, Tiled

SMOOTH = NetworkSpec(width=3, depth=2, activation="swish")
BATCHED = replace(SMOOTH, norm="batch")
NO_VIEWS = ClassViews(None, None)


class DoubleSource(ImageSource):
    """Gives its images in float64."""

    def gather(self, indices):
        return super().gather(indices).double()


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run_of(*, chunk=1000, classes=(0, 1, 2), counts=None, shape=(3, 8, 8), seed=0):
    images, targets = make_images(12, 3, shape, seed=0)
    if counts is not None:
        kept = torch.cat([(targets == c).nonzero().flatten()[:count] for c, count in enumerate(counts)])
        images, targets = images[kept], targets[kept]
    source = DoubleSource("toy", ["red", "green", "blue"], images, targets)
    return Run(source.train_only(), torch.device("cpu"), Rng(seed), classes, chunk)


def state_of(run, ipc=2, form=None, seed=3, symmetric=False):
    generator = torch.Generator().manual_seed(seed)
    count = ipc * len(run.classes)
    if form is None:
        images = Pixels(torch.randn(count, *run.source.shape, generator=generator))
        if symmetric:
            images.pixels.data.add_(images.pixels.data.flip(3))
    else:
        images = form.build([ipc] * len(run.classes), run.source.shape)
        images.fill_noise(generator)
    classes = torch.tensor(run.classes).repeat_interleave(ipc)
    return State(images, HardLabels(classes, run.source.num_classes))


def network_of(run, spec=SMOOTH):
    network = run.network(spec, 0)
    # Fresh networks have norm layers that do nothing: make them matter.
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def match(run, state, network, *, distance=layerwise_cosine, real_batch=4, views=NO_VIEWS, least=2, **options):
    """Loss, and gradient of what is stored."""
    state.images.zero_grad()
    weights = matched_weights(network, least)
    loss = match_gradients(
        run,
        state,
        0,
        network=network,
        weights=weights,
        distance=distance,
        real_batch=real_batch,
        views=views,
        **options,
    )
    (pixels,) = state.images.parameters()
    return loss, pixels.grad.clone()


def slow(
    run, state, network, *, distance=layerwise_cosine, real_batch=4, views=NO_VIEWS, least=2, synthetic_batch=None
):
    """The same by the formula: image by image, every parameter, one graph for all classes."""
    draws = run.rng.at("synthetic", 0)
    source = run.source
    index = source.per_class_indices(run.classes, real_batch, run.rng.at("real", 0))
    parameters = [parameter for parameter in network.parameters() if parameter.dim() >= least]
    before = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(True)

    def gradients(images, targets, position, **options):
        shown = [views.show(image[None], torch.tensor([position])) for image in images]
        losses = [cross_entropy(network(x), y[None]) for x, y in zip(shown, targets, strict=True)]
        return torch.autograd.grad(sum(losses) / len(losses), parameters, **options)

    total = torch.zeros(())
    images, items = state.images.decode()
    targets = state.labels.target(items)
    for position, label in enumerate(run.classes):
        rows = index[source.targets[index] == label]
        real = gradients(source.gather(rows), source.targets[rows], position)
        members = (state.labels.classes[items] == label).nonzero().flatten()
        if synthetic_batch is not None:
            members = members[torch.randperm(len(members), generator=draws)[:synthetic_batch]]
        total = total + distance(real, gradients(images[members], targets[members], position, create_graph=True))
    (pixels,) = state.images.parameters()
    (slope,) = torch.autograd.grad(total, pixels)
    for parameter, flag in zip(network.parameters(), before, strict=True):
        parameter.requires_grad_(flag)
    return total.detach(), slope


def check(run, state, network, **options):
    loss, slope = match(run, state, network, **options)
    expected, gradient = slow(run, state, network, **options)
    assert float(expected) > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(slope, gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max()))


def views_of(run, *ops):
    return ClassViews.drawn(Siamese(ops), run, 0)


# Loss and slope ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("distance", [layerwise_cosine, squared_error], ids=lambda one: one.__name__)
def test_the_step_is_that_of_the_formula_whatever_the_chunk(distance, chunk):
    run = run_of(chunk=chunk)
    check(run, state_of(run), network_of(run), distance=distance, views=views_of(run, "color", "crop", "scale"))


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("form", [Tiled(factor=2), Tiled(factor=3, bound=9)], ids=["tiles", "several factors"])
def test_every_decoded_image_counts_alike(form, chunk):
    run = run_of(chunk=chunk)
    check(run, state_of(run, 3, form), network_of(run), views=views_of(run, "flip", "cutout"))


def test_the_slope_is_that_of_finite_differences():
    run = run_of(classes=(0, 2), shape=(1, 4, 4))
    network = network_of(run, NetworkSpec(width=2, depth=1, activation="swish"))
    state = state_of(run)
    _, slope = match(run, state, network)
    pixels, step = state.images.pixels, 1e-6
    for place in (0, 17, 40, 63):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                pixels.view(-1)[place] += sign * step
            values.append(float(match(run, state, network)[0]))
            with torch.no_grad():
                pixels.view(-1)[place] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope.view(-1)[place]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("classes", [(1,), (2, 0)])
def test_some_classes_in_any_order(classes):
    run = run_of(classes=classes, chunk=3)
    check(run, state_of(run), network_of(run), views=views_of(run, "color", "rotate"))


@pytest.mark.parametrize(
    "spec", [NetworkSpec("mlp", width=5), replace(SMOOTH, norm="layer"), replace(SMOOTH, norm="none")], ids=str
)
def test_any_network_without_batch_statistics_will_do(spec):
    run = run_of(chunk=8)
    check(run, state_of(run, 3), network_of(run, spec))


def test_convolutions_alone():
    run = run_of()
    state, network = state_of(run), network_of(run)
    assert [weight.dim() for weight in matched_weights(network, 4).values()] == [4, 4]
    check(run, state, network, distance=squared_error, least=4)
    assert float(match(run, state, network, distance=squared_error, least=4)[0]) < float(
        match(run, state, network, distance=squared_error)[0]
    )


def test_the_real_images_themselves_have_no_loss():
    run = run_of(chunk=6)
    state = state_of(run, 4)
    index = run.source.per_class_indices(run.classes, 4, run.rng.at("real", 0))
    state.images.pixels.data.copy_(run.source.gather(index))
    loss, slope = match(run, state, network_of(run), distance=squared_error)
    assert float(loss) < 1e-25
    assert float(slope.abs().max()) < 1e-12


def test_a_batch_larger_than_a_class_takes_all_of_it():
    run = run_of(counts=(3, 12, 7), chunk=8)
    check(run, state_of(run), network_of(run), real_batch=8)


def test_the_network_is_left_alone_and_biases_cost_nothing():
    run = run_of()
    network = network_of(run)
    before = {name: parameter.clone() for name, parameter in network.state_dict().items()}
    names = list(matched_weights(network))
    assert names == ["blocks.0.conv.weight", "blocks.1.conv.weight", "classifier.weight"]
    match(run, state_of(run), network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


def test_weights_without_part_in_the_logits_change_nothing():
    class Idle(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.idle = inner, nn.Linear(4, 4)

        def forward(self, images):
            return self.inner(images)

    run = run_of()
    state, network = state_of(run), network_of(run)
    loss, slope = match(run, state, network, distance=squared_error)
    other, other_slope = match(run, state, Idle(network), distance=squared_error)
    assert torch.equal(loss, other)
    assert torch.equal(slope, other_slope)


# Soft labels, batches of synthetic images --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 1000])
def test_soft_labels_get_their_slope(chunk):
    run = run_of(chunk=chunk)
    state, network = state_of(run, 6), network_of(run)
    state.labels = SoftLabels.from_hard(state.labels, confidence=0.7).double()
    match(run, state, network)
    given = state.labels.logits.grad.clone()
    state.labels.zero_grad()
    found = []
    weights = matched_weights(network)
    options = {"network": network, "weights": weights, "distance": layerwise_cosine, "real_batch": 4, "views": NO_VIEWS}
    for place, step in ((0, 1e-6), (0, -1e-6), (7, 1e-6), (7, -1e-6)):
        state.labels.logits.data.view(-1)[place] += step
        found.append(float(match_gradients(run, state, 0, **options)))
        state.labels.logits.data.view(-1)[place] -= step
    for place, (up, down) in ((0, found[:2]), (7, found[2:])):
        assert (up - down) / 2e-6 == pytest.approx(float(given.view(-1)[place]), rel=1e-5)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_at_most_so_many_decoded_images_at_random(chunk):
    run = run_of(chunk=chunk, classes=(0, 1))
    state, network = state_of(run, 5), network_of(run)
    seen = set()
    for iteration in range(6):
        state.images.zero_grad()
        match_gradients(
            run,
            state,
            iteration,
            network=network,
            weights=matched_weights(network),
            distance=layerwise_cosine,
            real_batch=4,
            views=NO_VIEWS,
            synthetic_batch=3,
        )
        moved = (state.images.pixels.grad.flatten(1).abs().sum(1) > 0).view(2, 5)
        assert moved.sum(1).tolist() == [3, 3]
        seen |= {tuple(row) for row in moved.tolist()}
    assert len(seen) > 4
    assert torch.equal(match(run, state, network)[1], match(run, state, network, synthetic_batch=5)[1])
    check(run, state, network, synthetic_batch=3, views=views_of(run, "crop", "cutout"))
    check(run, state_of(run, 2, Tiled(factor=2)), network, synthetic_batch=3, views=views_of(run, "flip", "scale"))


# Mirrored pairs ----------------------------------------------------------------------------------------------


def mirrored(state):
    return replace(state, images=Mirrored(state.images))


@pytest.mark.parametrize("chunk", [2, 1000])
def test_a_mirrored_image_in_place_of_an_image_changes_nothing_but_its_own_side(chunk):
    run = run_of(chunk=chunk)
    state, network = state_of(run), network_of(run)
    loss, slope = match(run, mirrored(state), network)
    turned = [1, 4, 5]
    state.images.pixels.data[turned] = state.images.pixels.data[turned].flip(3)
    other, other_slope = match(run, mirrored(state), network)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    other_slope[turned] = other_slope[turned].flip(3)
    torch.testing.assert_close(other_slope, slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("most", "kept"), [(6, 3), (5, 2), (1, 1)])
def test_a_subset_keeps_images_and_their_mirrors_together(most, kept):
    run = run_of(chunk=4)
    state, network = state_of(run, 5), network_of(run)
    loss, slope = match(run, mirrored(state), network, synthetic_batch=most)
    assert (slope.flatten(1).abs().sum(1) > 0).view(3, 5).sum(1).tolist() == [kept] * 3
    turned = [0, 3, 4, 6, 9, 12, 13]
    state.images.pixels.data[turned] = state.images.pixels.data[turned].flip(3)
    other, other_slope = match(run, mirrored(state), network, synthetic_batch=most)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    other_slope[turned] = other_slope[turned].flip(3)
    torch.testing.assert_close(other_slope, slope, rtol=1e-8, atol=1e-12)


def test_symmetric_images_are_their_own_pairs():
    run = run_of()
    state, network = state_of(run, symmetric=True), network_of(run)
    torch.testing.assert_close(
        match(run, mirrored(state), network)[0], match(run, state, network)[0], rtol=1e-12, atol=0
    )


def test_a_shared_flip_changes_the_real_side_alone():
    run = run_of()
    state, network = state_of(run), network_of(run)
    record = Siamese(("flip",)).sample(3, run.source.shape, torch.Generator().manual_seed(0))
    flips = ClassViews(Siamese(("flip",)), replace(record, values=torch.ones_like(record.values)))

    def real_is_zero(real, synthetic):
        return squared_error([torch.zeros_like(one) for one in real], synthetic)

    plain, _ = match(run, mirrored(state), network, distance=real_is_zero)
    flipped, _ = match(run, mirrored(state), network, distance=real_is_zero, views=flips)
    torch.testing.assert_close(flipped, plain, rtol=1e-12, atol=0)
    assert float(match(run, mirrored(state), network, views=flips)[0]) != float(match(run, mirrored(state), network)[0])


# Batch normalisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 1000])
def test_settled_batch_normalisation_couples_nothing(chunk):
    run = run_of(chunk=chunk)
    network = network_of(run, BATCHED)
    settle_batchnorm(run, network, 0)
    check(run, state_of(run), network)


def test_batch_normalisation_that_is_not_settled_couples():
    losses = []
    for chunk in (4, 1000):
        run = run_of(chunk=chunk)
        losses.append(float(match(run, state_of(run), network_of(run, BATCHED), real_batch=8)[0]))
    assert abs(losses[0] - losses[1]) > 0.01 * losses[0]


def test_settling_takes_real_images_of_every_class_and_freezes_these_layers_alone():
    class Mixed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, momentum=None), nn.Dropout(0.5), nn.Flatten())

    run, network = run_of(counts=(3, 12, 12)), Mixed()
    settle_batchnorm(run, frozen(network), 5, real_batch=8)
    assert [part.training for part in network] == [True, False, False, True]
    index = run.source.per_class_indices(run.classes, 8, run.rng.at("batchnorm", 5))
    assert len(index) == 3 + 8 + 8
    maps = network[0](run.source.gather(index)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(network[1].running_mean, maps.mean(1).detach())
    torch.testing.assert_close(network[1].running_var, maps.var(1).detach())
    assert frozen(network)[1].training


def test_settling_a_fresh_network_goes_a_tenth_of_the_way():
    run, network = run_of(), network_of(run_of(), BATCHED)
    convolution, norm = network.blocks[0].conv, network.blocks[0].norm
    settle_batchnorm(run, network, 0)
    images = run.source.gather(run.source.per_class_indices(run.classes, 16, run.rng.at("batchnorm", 0)))
    maps = convolution(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean(1).detach())
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * maps.var(1).detach())


def test_settling_does_nothing_without_batch_normalisation():
    run = run_of()
    network = network_of(run)
    settle_batchnorm(run, network, 0)
    assert all(part.training for part in network.modules())
