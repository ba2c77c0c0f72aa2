"""Matching means of a signal that is no network's: what passes together, and what mirrored pairs and flips do to it."""

import pytest
import torch
from conftest import make_images

from dsdistill.augmentations import Siamese
from dsdistill.augmentations.siamese import SiameseViews
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, State
from dsdistill.labels import HardLabels
from dsdistill.matching import ClassViews, match_means
from dsdistill.parameterizations import Mirrored, Pixels

SHAPE, WIDTH = (3, 8, 8), 5
NO_VIEWS = ClassViews(None, None)


class DoubleSource(ImageSource):
    """Gives its images in float64."""

    def gather(self, indices):
        return super().gather(indices).double()


def run_of(chunk=1000):
    source = DoubleSource("toy", ["red", "green", "blue"], *make_images(12, 3, SHAPE, seed=0))
    return Run(source.train_only(), torch.device("cpu"), Rng(0), (0, 1, 2), chunk)


def state_of(run, ipc=2, *, mirrored=False):
    generator = torch.Generator().manual_seed(3)
    pixels = Pixels(torch.randn(3 * ipc, *SHAPE, generator=generator)).double()
    classes = torch.arange(3).repeat_interleave(ipc)
    return State(Mirrored(pixels) if mirrored else pixels, HardLabels(classes, 3))


def signal(images):
    """Tells an image from its mirror image."""
    weights = torch.randn(images[0].numel(), WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (images.flatten(1) @ weights / 10).tanh()


class Look:
    """Signal and distance, and what was seen of them: images per pass, and at most in one graph; means of both sides.

    The distance is that of the real means, or of a ``target`` in their place.
    """

    def __init__(self, monkeypatch, target=None):
        self.sizes, self.held, self.most, self.means, self.target = [], 0, 0, [], target
        backward = torch.Tensor.backward

        def freed(tensor, *rest):
            backward(tensor, *rest)
            self.held = 0

        monkeypatch.setattr(torch.Tensor, "backward", freed)

    def signal(self, images):
        self.sizes.append(len(images))
        self.held += len(images) * images.requires_grad
        self.most = max(self.most, self.held)
        return signal(images)

    def distance(self, real, synthetic):
        self.means.append((real.detach(), synthetic.detach()))
        return ((real if self.target is None else self.target) - synthetic).square().sum()


def match(run, state, look, *, views=NO_VIEWS, couples=False, **options):
    """Loss, and gradient of what is stored."""
    loss = match_means(
        run,
        state,
        0,
        signal=look.signal,
        distance=look.distance,
        real_batch=4,
        views=views,
        couples=couples,
        **options,
    )
    (stored,) = state.images.parameters()
    return loss, stored.grad


def all_flipped(run):
    return ClassViews(Siamese(("flip",)), SiameseViews(SHAPE, 3, ("flip",) * 3, torch.ones(3, 3)))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_loss_is_that_of_the_formula(chunk, monkeypatch):
    run = run_of(chunk)
    state, look = state_of(run), Look(monkeypatch)
    loss, gradient = match(run, state, look)
    leaf = state.images.pixels.detach().requires_grad_()
    rows = run.source.per_class_indices(run.classes, 4, run.rng.at("real", 0))
    real = signal(run.source.gather(rows)).view(3, 4, WIDTH).mean(1)
    wanted = (real - signal(leaf).view(3, 2, WIDTH).mean(1)).square().sum()
    assert float(wanted.detach()) > 0.1
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, leaf)[0], rtol=1e-11, atol=1e-14)


def test_a_flip_of_all_leaves_the_synthetic_side_of_mirrored_pairs_as_it_is(monkeypatch):
    found, run = {}, run_of()
    for mirrored in (True, False):
        for flipped in (False, True):
            look = Look(monkeypatch, target=0.5)
            views = all_flipped(run) if flipped else NO_VIEWS
            _, gradient = match(run, state_of(run, mirrored=mirrored), look, views=views)
            found[mirrored, flipped] = (*look.means[0], gradient)
    (real, pairs, gradient), (real_flipped, pairs_flipped, gradient_flipped) = found[True, False], found[True, True]
    torch.testing.assert_close(pairs_flipped, pairs, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient_flipped, gradient, rtol=0, atol=1e-14)
    assert float(gradient.abs().max()) > 1e-3
    assert float((real_flipped - real).abs().max()) > 1e-2  # the real side was flipped indeed
    _, single, _ = found[False, False]
    _, single_flipped, _ = found[False, True]
    assert float((single_flipped - single).abs().max()) > 1e-2  # and images without their mirrors would have been


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_where_images_couple_each_side_passes_whole_whatever_the_chunk(chunk, monkeypatch):
    run = run_of(chunk)
    look = Look(monkeypatch)
    match(run, state_of(run, ipc=9), look, couples=True)
    assert look.sizes == [12, 27]


@pytest.mark.parametrize(
    ("chunk", "unsplit", "most"),
    [(3, 1, 3), (3, 2, 3), (3, 3, 9), (3, None, 9), (2, None, 2), (2, 4, 2), (2, 5, 9), (9, 1, 9), (18, 1, 18)],
)
def test_a_class_of_a_few_chunks_is_one_graph_if_it_may(chunk, unsplit, most, monkeypatch):
    """A class is 9 images; on a CPU four chunks may be one graph if nothing is said."""
    run, found = run_of(chunk), []
    look = Look(monkeypatch)
    found.append(match(run, state_of(run, ipc=9), look, unsplit=unsplit))
    assert look.most == most
    found.append(match(run_of(), state_of(run, ipc=9), Look(monkeypatch)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-14)
