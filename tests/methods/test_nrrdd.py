"""NRR-DD: the choice of patches by hand, and the masked update against a plain loop."""

import math
from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained
from torch import nn
from torch.nn.functional import cross_entropy, pad

from dsdistill.augmentations import ResizedCrop
from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared
from dsdistill.engine.run import Execution
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee, Teachers
from dsdistill.matching.activation import activation_maps, last_maps
from dsdistill.matching.patches import cut
from dsdistill.matching.recovery import ByProblem, Problem, rng_of
from dsdistill.methods import FYI, NRRDD
from dsdistill.methods.nrrdd import maps_of
from dsdistill.networks import register_network
from dsdistill.networks.spec import NetworkSpec
from dsdistill.testing import toy_source

CPU = torch.device("cpu")
ONE = Teachers(networks=SPECS[:1])
SMALL = NRRDD(ipc=2, iterations=5, statistics_weight=0.3, shift=2, pool=6, crops=7, critical=3, teachers=ONE)


@pytest.fixture(scope="module")
def source():
    return toy_source(classes=3)


@pytest.fixture
def teacher(source, monkeypatch):
    """What every run finds, in place of a trained teacher."""
    made = untrained(source, SPECS[0])
    monkeypatch.setattr(Committee, "of", lambda run, teachers: Committee([made]))
    return made


def run_of(source, seed=0, chunk=5):
    return Run(source.train_only(), CPU, Rng(seed), tuple(range(source.num_classes)), chunk, shared=Shared())


def begun(method, source, index=0):
    """Run and state at the start of the job of an index."""
    run = run_of(source)
    job = method.jobs(run)[index]
    run = run.scoped(job)
    return run, method.start(run, job)


def made(method, source, seed=0):
    return Execution(method, run_of(source, seed))()


# The mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [0.5, 1.0])
def test_where_all_is_critical_nothing_moves(activation, source, teacher, monkeypatch):
    monkeypatch.setattr(
        "dsdistill.methods.nrrdd.maps_of", lambda run, who, images, classes: torch.full((len(images), 8, 8), activation)
    )
    method = replace(SMALL, iterations=20, lr_images=3.0)
    run, state = begun(method, source)
    before = state.images.pixels.detach().clone()
    for step in range(20):
        method.step(run, state, step)
    assert before.view(torch.int32).equal(state.images.pixels.detach().view(torch.int32))
    assert float(state.images.pixels.grad.abs().max()) > 0
    assert float(state.extras["mask"].max()) == 0


def test_a_threshold_of_zero_keeps_the_mosaics(source, teacher):
    method = replace(SMALL, threshold=0.0)
    images, targets = made(method, source).tensors()
    for label in range(3):
        patches = method.critical_patches(run_of(source), teacher, label)
        assert torch.equal(images[targets == label], cut(run_of(source), patches.rows[:2], patches.boxes[:2], (8, 8)))


def test_critical_pixels_stay_to_the_last_bit_and_others_move(source, teacher):
    run, state = begun(SMALL, source)
    mask = state.extras["mask"].clone()
    maps = maps_of(run, teacher, state.images.pixels.detach(), state.labels.classes)
    assert torch.equal(mask[:, 0], (0.5 - maps).clamp_min(0))
    critical = (mask == 0).expand(-1, 3, -1, -1)
    assert 0.05 < float(critical.float().mean()) < 0.95
    before = state.images.pixels.detach().clone()
    for step in range(4):
        SMALL.step(run, state, step)
    after = state.images.pixels.detach()
    assert torch.equal(after[critical], before[critical])
    assert float((after != before)[~critical].float().mean()) > 0.8  # the rest was in no crop
    assert torch.equal(state.extras["mask"], mask)  # made once
    assert not torch.allclose(mask[:, 0], (0.5 - maps_of(run, teacher, after, state.labels.classes)).clamp_min(0))


def gradient(method, run, state, step):
    """That of the loss in the stored images, by hooks."""
    (problem,) = method.problems(run, run.rng.job)
    network, found = Committee.of(run, method.teachers)[0].network, []
    images = state.images.pixels.detach().requires_grad_()

    def hook(module, arguments, result):
        maps = arguments[0].transpose(0, 1).flatten(1)
        found.append(
            (maps.var(1, unbiased=False) - module.running_var).norm() + (maps.mean(1) - module.running_mean).norm()
        )

    handles = [part.register_forward_hook(hook) for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    views = method.views(run, step)
    shown = views.apply(images, views.sample(1, run.source.shape, rng_of(run, problem).at("views", step)))
    entropy = cross_entropy(network(shown), torch.tensor(problem.classes))
    for handle in handles:
        handle.remove()
    loss = entropy + method.statistics_weight * (method.first_layer * found[0] + sum(found[1:]))
    return torch.autograd.grad(loss, images)[0]


def in_range(images, source):
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (source.normalization.mean, source.normalization.std))
    return ((images * std + mean).clamp(0, 1) - mean) / std


def test_above_one_it_is_recovery_scaled_by_what_is_left_of_the_threshold(source, teacher):
    """With SGD; and without the mask it is recovery as it is."""
    method = replace(SMALL, threshold=1.25)
    for masked in (True, False):
        run, state = begun(method, source, index=1)
        maps = maps_of(run, teacher, state.images.pixels.detach(), state.labels.classes)[:, None]
        state.optimizers["images"] = torch.optim.SGD(state.images.parameters())
        for step in range(3):
            before = state.images.pixels.detach().clone()
            rate = 0.5 * method.lr_images * (1 + math.cos(math.pi * step / method.iterations))
            factor = 1.25 - maps if masked else 1.0
            expected = in_range(before - factor * rate * gradient(method, run, state, step), source)
            if not masked:
                state.extras["mask"].fill_(1.0)
            method.step(run, state, step)
            torch.testing.assert_close(state.images.pixels.detach(), expected, rtol=1e-4, atol=1e-5)
            assert float((expected - before).abs().max()) > 1e-3


def test_the_update_of_adam_is_multiplied_and_not_its_gradient(source, teacher):
    run, state = begun(SMALL, source)
    before, mask = state.images.pixels.detach().clone(), state.extras["mask"]
    wanted = gradient(SMALL, run, state, 0)
    SMALL.step(run, state, 0)
    # The first update of Adam is the step size, whatever the size of the gradient.
    expected = in_range(before - mask * SMALL.lr_images * wanted.sign(), source)
    clear = (wanted.abs() > 1e-5) & (mask > 0)
    assert float(clear.float().mean()) > 0.1
    torch.testing.assert_close(state.images.pixels.detach()[clear], expected[clear], rtol=1e-3, atol=1e-4)


def test_a_mask_of_ones_is_recovery_to_the_last_bits(source, teacher, monkeypatch):
    method = replace(SMALL, threshold=1.0)
    monkeypatch.setattr("dsdistill.methods.nrrdd.maps_of", lambda run, who, images, classes: 0 * images[:, 0])
    found = made(method, source).tensors()[0]
    monkeypatch.setattr(NRRDD, "_update", ByProblem._update)
    torch.testing.assert_close(found, made(method, source).tensors()[0], rtol=1e-5, atol=1e-5)


# The initial images ------------------------------------------------------------------------------------------


def slow_choice(method, source, teacher, label, factor):
    """Loops over images and crops: those that hold most of the map, the least recognised of them, images in order."""
    run = run_of(source)
    rng = run.rng.within("critical", label)
    rows = source.per_class_indices([label], method.pool, rng.at("pool"))
    drawn = ResizedCrop(scale=(0.08, 1.0), ratio=(1.0, 1.0), flip=0.0).sample(
        len(rows) * method.crops, source.shape, rng.at("crops"), per="image"
    )
    layer, size = last_maps(teacher.network, source.shape), 8 // factor
    found = []
    for number, row in enumerate(rows):
        image = source.gather(row[None])
        seen = activation_maps(teacher.network, layer, image, torch.tensor([label]))[0]
        boxes = drawn.boxes[number * method.crops : (number + 1) * method.crops]
        shares = [float(seen[y : y + h, x : x + w].sum() / seen.sum()) for y, x, h, w in boxes.tolist()]
        ranked = sorted(range(method.crops), key=lambda place: -shares[place])[: method.critical]
        losses = []
        for place in ranked:
            margin = (8 - size) // 2
            patch = cut(run, row[None], boxes[place][None], (size, size))
            framed = pad(patch, (margin, 8 - size - margin) * 2)
            losses.append(float(cross_entropy(teacher.network(framed), torch.tensor([label])).detach()))
        best = min(range(len(ranked)), key=lambda place: rank(losses[place], method.trusted))
        found.append((losses[best], int(row), boxes[ranked[best]].tolist()))
    return sorted(found, key=lambda one: rank(one[0], method.trusted))


def rank(loss, trusted):
    """Trusted patches from the least recognised on, then others from the most recognised on."""
    return (0, -loss) if math.exp(-loss) >= trusted else (1, loss)


@pytest.mark.parametrize("trusted", [0.0, 0.34, 0.99])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("label", [0, 2])
def test_patches_hold_what_the_teacher_sees_and_are_recognised_least(factor, label, trusted, source, teacher):
    method = replace(SMALL, factor=factor, ipc=1, trusted=trusted)
    found = method.critical_patches(run_of(source), teacher, label)
    expected = slow_choice(method, source, teacher, label, factor)
    assert found.rows.tolist() == [row for _, row, _ in expected]
    assert found.boxes.tolist() == [box for _, _, box in expected]
    torch.testing.assert_close(found.losses, torch.tensor([loss for loss, _, _ in expected]), rtol=1e-4, atol=1e-5)
    if trusted == 0:
        assert found.losses.tolist() == sorted(found.losses.tolist(), reverse=True)


def test_trusted_patches_come_first_and_each_image_gives_one_if_it_can(source, teacher):
    """Of losses by hand: 0.2 and 0.6 are trusted at 1/2, 0.8 and 2 are not."""
    places = replace(SMALL, trusted=0.5)._places(torch.tensor([[0.2, 0.6, 0.8], [2.0, 0.8, 0.9]]))
    assert places.argmin(1).tolist() == [1, 1]
    assert places.flatten().argsort().tolist()[:4] == [1, 0, 2, 4]


def test_cells_of_mosaics_are_dealt_by_rank(source, teacher):
    method = replace(SMALL, factor=2, ipc=2, pool=8)
    run = run_of(source)
    patches = method.critical_patches(run, teacher, 1)
    parts = cut(run, patches.rows, patches.boxes, (4, 4))
    for index in range(2):
        image = method.first_images(run, Problem(index, (1,)))[0]
        for cell in range(4):
            top, left = 4 * (cell // 2), 4 * (cell % 2)
            assert torch.equal(image[:, top : top + 4, left : left + 4], parts[2 * cell + index])


def test_the_choice_does_not_depend_on_the_chunk(source, teacher):
    one, many = (SMALL.critical_patches(run_of(source, chunk=size), teacher, 1) for size in (1, 1000))
    assert (one.rows.tolist(), one.boxes.tolist()) == (many.rows.tolist(), many.boxes.tolist())


# Runs --------------------------------------------------------------------------------------------------------


def test_problems_that_pass_together_stay_their_own(source, teacher):
    together, alone = (made(replace(SMALL, problems_together=size), source).tensors()[0] for size in (2, 1))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_mirrored_pairs_share_the_mask_of_their_stored_image(source, teacher):
    run, state = begun(SMALL, source)
    critical = (state.extras["mask"] == 0).expand(-1, 3, -1, -1)
    before = state.images.pixels.detach().clone()
    wrapped = FYI(base=SMALL)
    state = wrapped.start(run, SMALL.jobs(run)[0])
    wrapped.step(run, state, 0)
    after = state.images.base.pixels.detach()
    assert torch.equal(after[critical], before[critical])
    assert not torch.equal(after, before)


def test_defaults_are_the_inferred_ones():
    method = NRRDD()
    assert (method.threshold, method.critical, method.statistics_weight, method.first_layer) == (0.5, 5, 0.01, 10.0)
    assert (method.iterations, method.lr_images, method.pool, method.factor) == (1000, 0.1, 300, None)
    assert method.trusted == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"critical": 8}, InvalidSetting, r"NRRDD.critical = 8 .*at most the 7 crops"),
        ({"factor": 2, "ipc": 2}, InvalidSetting, r"NRRDD.pool = 6 .*at least 8"),
        ({"ipc": 13, "pool": 13}, BadData, r"fewer than the 13 images that ipc=13 takes.*'class 0' \(12\)"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(changes, error, message, source):
    with pytest.raises(error, match=message):
        replace(SMALL, **changes).check(source)


def blind(shape, num_classes):
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes), nn.BatchNorm1d(num_classes))


def test_a_teacher_without_maps_is_refused_before_it_is_trained(source):
    register_network("blind", blind)
    with pytest.raises(InvalidSetting, match=r"network = 'blind' .*feature maps"):
        replace(SMALL, teachers=Teachers(networks=(NetworkSpec("blind"),))).check(source)


def test_a_committee_is_refused(source, monkeypatch):
    members = [untrained(source, spec) for spec in SPECS]
    monkeypatch.setattr(Committee, "of", lambda run, teachers: Committee(members))
    with pytest.raises(InvalidSetting, match="NRRDD takes one teacher"):
        SMALL.prepare(run_of(source))
