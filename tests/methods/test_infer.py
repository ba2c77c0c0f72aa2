"""INFER against a plain loop for one compensator, its budget, and what is stored."""

import math
from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained
from torch import nn
from torch.nn.functional import cross_entropy

from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared, estimate
from dsdistill.engine.run import Execution
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee, Teachers
from dsdistill.methods import FYI, INFER
from dsdistill.methods.infer import real_per_class
from dsdistill.parameterizations import Compensated
from dsdistill.synthetic import SyntheticDataset
from dsdistill.testing import toy_source

CPU = torch.device("cpu")
THREE = Teachers(networks=SPECS)
SMALL = INFER(ipc=4, iterations=5, lr_images=0.1, statistics_weight=0.3, shift=2, compensators=2, teachers=THREE)


@pytest.fixture(scope="module")
def source():
    return toy_source(classes=4)


@pytest.fixture
def committee(source, monkeypatch):
    """What every run finds, in place of trained teachers."""
    made = Committee([untrained(source, spec, seed) for seed, spec in enumerate(SPECS)])
    monkeypatch.setattr(Committee, "of", lambda run, teachers: made)
    return made


def run_of(source, seed=0):
    return Run(source.train_only(), CPU, Rng(seed), tuple(range(source.num_classes)), 1000, shared=Shared())


def made(method, source, seed=0):
    return Execution(method, run_of(source, seed))()


def loss_of(method, network, shown, classes):
    """Cross-entropy and distances of statistics, by hooks."""
    found = []

    def hook(module, arguments, result):
        maps = arguments[0].transpose(0, 1).flatten(1)
        found.append(
            (maps.var(1, unbiased=False) - module.running_var).norm() + (maps.mean(1) - module.running_mean).norm()
        )

    handles = [part.register_forward_hook(hook) for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    entropy = cross_entropy(network(shown), classes)
    for handle in handles:
        handle.remove()
    statistics = sum((method.first_layer if n == 0 else 1) * one for n, one in enumerate(found))
    return entropy + method.statistics_weight * statistics


def by_hand(method, source, network, index, place, anchors, parts):
    """The compensator of a teacher for one image index, as the paper has it; sums are clipped."""
    low, high = (source.normalization.standardize(torch.full((3, 1, 1), one)) for one in (0.0, 1.0))
    run, classes = run_of(source), torch.arange(source.num_classes)
    added = torch.zeros(1, *source.shape, requires_grad=True)
    optimizer = torch.optim.Adam([added], betas=(0.5, 0.9))
    for step in range(method.iterations):
        optimizer.param_groups[0]["lr"] = 0.5 * method.lr_images * (1 + math.cos(math.pi * step / method.iterations))
        total = anchors + added
        images = total - (total - high).relu() + (low - total).relu()
        views = method.views(run, step)
        rng = run.rng.within(f"index {index}", place)
        shown = views.apply(images, views.sample(1, source.shape, rng.at("views", step)))
        loss = sum(loss_of(method, network, shown[part], classes[part]) * len(part) for part in parts) / len(classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return added.detach()


# The budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "teachers", "ipc", "real", "images"),
    [
        *((10, 4, 10, 7, 35), (10, 4, 50, 35, 175), (10, 4, 100, 71, 355)),
        *((100, 4, 10, 9, 45), (100, 4, 50, 48, 240), (100, 4, 100, 96, 480)),
        *((200, 4, 10, 9, 45), (200, 4, 50, 49, 245), (200, 4, 100, 98, 490)),
        *((1000, 3, 10, 9, 36), (1000, 3, 50, 49, 196), (1000, 3, 100, 99, 396)),
    ],
)
def test_counts_of_the_paper(classes, teachers, ipc, real, images):
    assert real_per_class(ipc, classes, teachers) == real
    assert real * (teachers + 1) == images
    assert real == math.floor(ipc / (teachers / classes + 1))


@pytest.mark.parametrize("classes", range(1, 30))
def test_a_budget_is_used_and_never_passed(classes):
    for teachers in range(6):
        for ipc in range(1, 40):
            real = real_per_class(ipc, classes, teachers)
            assert real * (classes + teachers) <= ipc * classes < (real + 1) * (classes + teachers)
    assert real_per_class(7, classes, 0) == 7


def test_a_set_takes_no_more_bytes_than_its_budget_in_images(source, committee):
    synthetic = made(SMALL, source)
    image = 3 * 8 * 8 * 4
    anchors, added = 2 * 4, 2 * 2  # ⌊4 · 4 / 6⌋ = 2 of each of 4 classes, 2 compensators for each index
    assert synthetic.nbytes.images == (anchors + added) * image + anchors * 4
    assert anchors + added <= SMALL.ipc * 4
    assert (len(synthetic), synthetic.ipc, synthetic.counts) == (2 * 3 * 4, 2, (2, 2, 2, 2))
    assert isinstance(synthetic.images, Compensated)


# The loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_at_zero_the_loss_is_that_of_the_real_batch(index, source, committee):
    run = run_of(source)
    job = SMALL.jobs(run)[index]
    run = run.scoped(job)
    state = SMALL.start(run, job)
    images, owner = state.images.decode()
    real = images[:4].detach()
    assert torch.equal(images.detach(), real.repeat(3, 1, 1, 1))
    assert all(any(torch.equal(one, other) for other in source.gather(torch.arange(len(source)))) for one in real)
    losses = []
    for place, teacher in enumerate(committee[:2]):
        views = SMALL.views(run, 0)
        record = views.sample(1, source.shape, run_of(source).rng.within(f"index {index}", place).at("views", 0))
        losses.append(loss_of(SMALL, teacher.network, views.apply(real, record), torch.arange(4)))
    found = SMALL.step(run, state, 0)
    torch.testing.assert_close(found["loss"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    assert owner.tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop": True},
        {"problems_together": 2},
        {"first_layer": 3.0},
        {"lr_images": 1.0},
        {"classes_together": 2},
        {"classes_together": 3, "problems_together": 2, "crop": True},
    ],
    ids=str,
)
def test_compensators_are_those_of_a_plain_loop(changes, source, committee):
    method = replace(SMALL, **changes)
    images, targets = made(method, source).tensors()
    parts = [torch.arange(4)] if method.classes_together >= 4 else [torch.tensor([0, 1]), torch.tensor([2, 3])]
    anchors, *blocks = images.chunk(3)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (source.normalization.mean, source.normalization.std))
    for index in range(2):
        own = torch.tensor([(targets[: len(anchors)] == label).nonzero()[index].item() for label in range(4)])
        for place, block in enumerate(blocks):
            added = by_hand(method, source, committee[place].network, index, place, anchors[own], parts)
            assert float(added.abs().max()) > method.lr_images
            expected = (((anchors[own] + added) * std + mean).clamp(0, 1) - mean) / std
            torch.testing.assert_close(block[own], expected, rtol=1e-3, atol=2e-3)


def test_images_stay_in_range_whatever_the_step_size(source, committee):
    synthetic = made(replace(SMALL, lr_images=5.0), source)
    unit = source.normalization.to_unit(synthetic.tensors()[0])
    assert float(unit.min()) >= -1e-6
    assert float(unit.max()) <= 1 + 1e-6
    assert float(synthetic.images.compensators.detach().abs().max()) > 4


# What is asked of whom ---------------------------------------------------------------------------------------


def test_without_compensators_the_set_is_real_images_and_nobody_is_asked(source, monkeypatch):
    monkeypatch.setattr(Committee, "of", lambda run, teachers: pytest.fail("teachers were asked"))
    synthetic = made(replace(SMALL, compensators=0), source)
    real = source.gather(torch.arange(len(source)))
    images, targets = synthetic.tensors()
    places = [next(row for row, other in enumerate(real) if torch.equal(image, other)) for image in images]
    assert len(set(places)) == len(images) == 4 * 4
    assert source.targets[places].tolist() == targets.tolist()
    assert replace(SMALL, compensators=0).steps == 0


def test_anchors_are_other_ones_for_each_index_and_the_same_ones_for_each_teacher(source, committee):
    images, targets = made(replace(SMALL, ipc=9), source).tensors()  # 6 of each class
    anchors = images.chunk(3)[0]
    assert len({tuple(image.flatten().tolist()) for image in anchors}) == len(anchors) == 6 * 4
    assert targets.tolist() == torch.arange(4).repeat_interleave(6).repeat(3).tolist()


def test_every_teacher_has_a_compensator_unless_told_otherwise(source, committee):
    synthetic = made(replace(SMALL, compensators=None), source)
    assert synthetic.images.compensators.shape[:2] == (2, 3)
    assert [note for note in synthetic.recipe.notes if "recovered from" in note] == [
        f"recovered from {one.name}, {one.digest[:16]}" for one in committee
    ]
    assert len(made(SMALL, source).recipe.notes) == 2


def test_jobs_are_known_without_teachers(source, monkeypatch):
    monkeypatch.setattr(Committee, "of", lambda run, teachers: pytest.fail("teachers were asked"))
    method = replace(SMALL, ipc=8, compensators=None, problems_together=2)  # ⌊32 / 7⌋ = 4 indices
    assert [job.key for job in method.jobs(run_of(source))] == ["0000x2", "0002x2"]


def test_a_set_is_read_again_and_cut(source, committee, tmp_path):
    synthetic = made(SMALL, source)
    loaded = SyntheticDataset.load(synthetic.save(tmp_path / "set"))
    assert torch.equal(loaded.tensors()[0], synthetic.tensors()[0])
    assert loaded.subset(1).images.compensators.shape[0] == 1


def test_mirrored_pairs_pass_together(source, committee):
    together, alone = (made(FYI(base=replace(SMALL, problems_together=size)), source) for size in (2, 1))
    assert together.counts == (2, 2, 2, 2)
    torch.testing.assert_close(together.tensors()[0], alone.tensors()[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(alone.tensors()[0], made(SMALL, source).tensors()[0], atol=1e-2)


def test_a_run_is_estimated(source, committee):
    told = estimate(SMALL, source, device="cpu")
    assert told.steps == 2 * SMALL.iterations


# Settings ----------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_cifar_and_imagenet_is_a_preset():
    method = INFER.preset("cifar")
    assert method == replace(INFER(), shift=4)
    assert (method.iterations, method.lr_images, method.statistics_weight, method.crop) == (1000, 0.25, 1.0, False)
    assert len(method.teachers.networks) == 4
    large = INFER.preset("imagenet")
    assert (large.iterations, large.lr_images, large.statistics_weight, large.crop) == (2000, 0.25, 0.01, True)
    assert (large.shift, large.classes_together, len(large.teachers.networks)) == (32, 1000, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ipc": 1}, InvalidSetting, r"INFER.ipc = 1 .*at least 2: one real image of each of 4 classes, and 2 comp"),
        ({"compensators": 4}, InvalidSetting, r"INFER.compensators = 4 .*at most 3"),
        ({"ipc": 40}, BadData, r"fewer than the 26 real images that ipc=40 takes: 'class 0' \(12\).*lower ipc"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(changes, error, message, source):
    with pytest.raises(error, match=message):
        replace(SMALL, **changes).check(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"compensators": 4}, "at most 3"), ({"compensators": None, "ipc": 1}, "at least 2.*and 3 compensators")],
    ids=str,
)
def test_what_a_folder_holds_is_asked_before_any_work(changes, message, source, committee, monkeypatch):
    monkeypatch.setattr(Teachers, "require", lambda self, method, *, alone: None)
    method = replace(SMALL, teachers=Teachers(folder="teachers"), **changes)
    if changes["compensators"] is not None:
        method.check(source)
    with pytest.raises(InvalidSetting, match=message):
        method.prepare(run_of(source))


def test_whitened_images_are_refused(source):
    white = source.normalized_by(source.normalization.whitened([source.images]))
    with pytest.raises(BadData, match="whitened"):
        SMALL.check(white)
