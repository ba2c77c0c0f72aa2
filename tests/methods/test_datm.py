"""DATM: its window, its start, its guard."""

import gc
from dataclasses import replace

import pytest
import torch
from methods.following import compare_by_hand, table_of
from methods.stepping import begin, run_of

from dsdistill import synthesize
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Experts, FlatTraining
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.methods import DATM
from dsdistill.methods.datm import agreed_logits, correct_images
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Pixels, Tiled
from dsdistill.testing import check_synthesizer

SMALL = NetworkSpec(width=8, depth=1)
FEW = Experts(count=3, training=FlatTraining(epochs=6, batch_size=6, lr=0.1))
METHOD = DATM(
    ipc=2,
    iterations=4,
    student_steps=3,
    max_start_epoch=4,
    lr_images=2.0,
    lr_student=0.01,
    guard=100.0,
    network=SMALL,
    experts=FEW,
)


@pytest.mark.parametrize(("iteration", "end"), [(0, 10), (99, 10), (100, 11), (999, 19), (1000, 20), (5000, 20)])
def test_the_window_grows(iteration, end):
    assert DATM(first_max_start_epoch=10, max_start_epoch=20, grown=1000).window_end(iteration) == end


def test_without_growth_the_window_is_there_from_the_start():
    assert DATM(max_start_epoch=20).window_end(0) == 20


def test_it_grows_over_half_of_the_run_unless_told():
    method = DATM(first_max_start_epoch=10, max_start_epoch=20, iterations=100)
    assert [method.window_end(iteration) for iteration in (0, 4, 5, 49, 50, 99)] == [10, 10, 11, 19, 20, 20]


def test_students_start_inside_the_window(source):
    method = replace(METHOD, min_start_epoch=1, first_max_start_epoch=2, grown=50)
    run = run_of(source)
    assert {method.segment(run, i, method.window_end(0)).epoch for i in range(20)} == {1}
    assert {method.segment(run, i, method.window_end(60)).epoch for i in range(40)} == {1, 2, 3}


def test_a_step_takes_the_window_of_its_iteration(source):
    method = replace(METHOD, first_max_start_epoch=1, grown=30)
    run = run_of(source)
    state = begin(method, run)
    starts = [float(method.step(run, state, iteration)["start_epoch"]) for iteration in range(50)]
    assert set(starts[:10]) == {0}
    assert max(starts[10:20]) <= 1
    assert set(starts[30:]) == {0, 1, 2, 3}


@pytest.mark.parametrize("first", [1, 5])
def test_a_window_out_of_bounds_is_refused(source, first):
    with pytest.raises(InvalidSetting, match="first_max_start_epoch"):
        replace(METHOD, min_start_epoch=1, first_max_start_epoch=first).check(source)


def logits_of(run, trajectories, expert, rows):
    return trajectories.network(trajectories.snapshots(expert, [METHOD.last_epoch])[0], run.source.gather(rows))


def test_it_starts_from_images_that_an_expert_gets_right(source):
    run = run_of(source)
    trajectories = METHOD.trajectories(run)
    chosen = correct_images(run, trajectories, METHOD.last_epoch, 4)
    for label, rows in zip(run.classes, chosen, strict=True):
        assert len(set(rows.tolist())) == 4
        assert run.source.targets[rows].tolist() == [label] * 4
        right = [logits_of(run, trajectories, expert, rows).argmax(1) == label for expert in range(3)]
        assert bool(torch.stack(right).any(0).all())
    assert [rows.tolist() for rows in chosen] != [sorted(rows.tolist()) for rows in chosen]


def test_what_no_expert_gets_right_is_taken_last_and_said(source, caplog):
    run = run_of(source)
    trajectories = METHOD.trajectories(run)
    with caplog.at_level("WARNING", "dsdistill"):
        chosen = correct_images(run, trajectories, 0, 12)  # before training
    assert "nearest serve too" in caplog.text
    margins = []
    for label, rows in zip(run.classes, chosen, strict=True):
        assert sorted(rows.tolist()) == list(range(12 * label, 12 * label + 12))
        every = torch.stack(
            [trajectories.network(trajectories.snapshots(e, [0])[0], run.source.gather(rows)) for e in range(3)]
        )
        others = every.clone()
        others[..., label] = -torch.inf
        margin = (every[..., label] - others.amax(2)).amax(0)
        missing = margin[margin <= 0]
        margins.append(len(missing))
        assert bool((margin[: 12 - len(missing)] > 0).all())
        assert torch.equal(missing, missing.sort(descending=True).values)
    assert max(margins) > 0


def test_labels_start_from_the_experts_that_are_right(source):
    run = run_of(source)
    trajectories = METHOD.trajectories(run)
    rows = torch.tensor([0, 5, 14, 30])
    found = agreed_logits(
        run,
        trajectories,
        METHOD.last_epoch,
        range(3),
        Pixels(run.source.gather(rows)),
        HardLabels(run.source.targets[rows], 3),
    )
    for place, row in enumerate(rows):
        each = torch.stack([logits_of(run, trajectories, expert, row[None])[0] for expert in range(3)])
        right = each[each.argmax(1) == run.source.targets[row]]
        expected = (right if len(right) else each).mean(0)
        assert torch.allclose(found[place], expected, atol=1e-5)


def test_experts_with_batch_normalisation_see_mixed_classes(source):
    method, run = replace(METHOD, network=replace(SMALL, norm="batch")), run_of(source, chunk=6)
    trajectories, rows = method.trajectories(run), torch.arange(12)  # class after class
    images, labels = run.source.gather(rows), HardLabels(run.source.targets[rows], 3)
    assert run.couples_batches
    found = agreed_logits(run, trajectories, 1, [0], Pixels(images), labels)
    theta, order = trajectories.snapshots(0, [1])[0], torch.randperm(12, generator=run.rng.at("outputs", device="cpu"))
    expected = torch.empty(12, 3)
    for part in order.split(6):
        expected[part] = trajectories.network(theta, images[part])
    assert torch.allclose(found, expected, atol=1e-5)
    in_order = torch.cat([trajectories.network(theta, part) for part in images.split(6)])
    assert float((found - in_order).abs().max()) > 1e-3


class Told:
    """Experts of which each makes of image i, whose pixels are i, what a table (experts, images, classes) says."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def snapshots(self, expert, epochs):
        return self.table[expert].reshape(1, -1).expand(len(epochs), -1)

    def network(self, theta, images):
        return theta.view(self.table.shape[1:])[images[:, 0, 0, 0].long()]


def labels_by(told, run, classes):
    images = torch.arange(len(classes)).float()[:, None, None, None].expand(-1, 3, 8, 8)
    labels = HardLabels(torch.tensor(classes), 3)
    return agreed_logits(run, told, 0, range(len(told.table)), Pixels(images), labels)


def test_labels_of_experts_that_disagree(source):
    told = Told(
        [
            [[5.0, 1.0, 0.0], [5.0, 1.0, 0.0], [5.0, 1.0, 0.0]],
            [[1.0, 3.0, 6.0], [0.0, 1.0, 4.0], [7.0, 2.0, 0.0]],
            [[3.0, 2.0, 2.0], [0.0, 9.0, 4.0], [3.0, 0.0, 6.0]],
        ]
    )
    found = labels_by(told, run_of(source, chunk=2), [0, 1, 1])
    first_and_last, last, none_is_right = [4.0, 1.5, 1.0], [0.0, 9.0, 4.0], [5.0, 1.0, 2.0]
    assert torch.allclose(found, torch.tensor([first_and_last, last, none_is_right]))


def test_labels_of_many_experts_take_no_more_memory_than_those_of_few(source):
    images, alive = 7, []

    class Counted(Told):
        def network(self, theta, images):
            alive.append(sum(type(one) is torch.Tensor and one.shape == (7, 3) for one in gc.get_objects()))
            return super().network(theta, images)

    labels_by(Counted(torch.zeros(6, images, 3).tolist()), run_of(source), [0] * images)
    assert len(alive) == 6
    assert len(set(alive[1:])) == 1


def test_labels_start_from_all_experts(source):
    run = run_of(source)
    state = begin(METHOD, run)
    hard = HardLabels(state.labels.classes, 3)
    found = [
        agreed_logits(run, METHOD.trajectories(run), METHOD.last_epoch, range(count), state.images, hard)
        for count in (1, 2, 3)
    ]
    assert torch.equal(state.labels.logits, found[2])
    assert not any(torch.allclose(state.labels.logits, few) for few in found[:2])


def test_every_label_starts_with_its_class_on_top(source):
    state = begin(METHOD, run_of(source))
    assert isinstance(state.labels, SoftLabels)
    assert state.labels.logits.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    assert bool(torch.isfinite(state.labels.logits).all())


def test_random_start_takes_the_logits_of_one_expert(source):
    method = replace(METHOD, init="random")
    run = run_of(source)
    state = begin(method, run)
    trajectories = method.trajectories(run)
    images = state.images.decode().images
    expected = trajectories.network(trajectories.snapshots(0, [method.last_epoch])[0], images)
    assert torch.allclose(state.labels.logits, expected, atol=1e-5)


def test_a_step_equals_the_formula(source):
    method = replace(METHOD, lr_labels=20.0, lr_lr=1e-3, batch_size=4)
    compare_by_hand(method, run_of(source), 2, begin)


def test_above_the_guard_nothing_moves(source):
    method = replace(METHOD, guard=1e-6)
    run = run_of(source)
    state = begin(method, run)
    before = [
        state.images.pixels.detach().clone(),
        state.labels.logits.detach().clone(),
        state.extras["lr"].raw.detach().clone(),
    ]
    told = method.step(run, state, 0)
    assert float(told["skipped"]) == 1
    assert float(told["loss"]) > 1e-6
    after = [state.images.pixels, state.labels.logits, state.extras["lr"].raw]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert int(state.extras["skipped"]) == 1
    assert float(METHOD.step(run, state, 1)["skipped"]) == 0
    assert int(state.extras["skipped"]) == 0
    assert not torch.equal(before[0], state.images.pixels)
    assert not torch.equal(before[1], state.labels.logits)


def test_a_loss_that_is_no_number_is_skipped_and_not_told(source):
    run = run_of(source)
    state = begin(METHOD, run)
    state.extras["lr"].raw.data.fill_(1e30)
    before = state.images.pixels.detach().clone()
    told = METHOD.step(run, state, 0)
    assert float(told["skipped"]) == 1
    assert "loss" not in told
    assert torch.equal(before, state.images.pixels)


def test_a_run_that_only_skips_is_stopped(source):
    with pytest.raises(InvalidSetting, match="the last 3 updates were skipped"):
        synthesize(replace(METHOD, guard=1e-6, patience=3, iterations=10), source, progress=False)


@pytest.mark.parametrize("changes", [{"init": "random", "labels": "hard"}, {"form": Tiled(factor=2)}], ids=str)
def test_datm_keeps_the_contract_in_its_variants(changes):
    assert len(check_synthesizer(replace(METHOD, **changes))) == 9


def test_settings_by_default():
    method = DATM()
    assert (method.iterations, method.student_steps, method.guard, method.patience) == (10_000, 80, 1.0, 200)
    assert (method.lr_labels, method.momentum_labels, method.labels) == (2.0, 0.9, "soft")
    training = method.experts.training
    assert (training.epochs, training.rho, training.alpha, training.adaptive) == (100, 0.01, 0.3, True)
    assert (training.lr, training.batch_size, training.momentum, training.weight_decay) == (0.01, 256, 0, 0)


def test_presets_are_those_of_the_authors():
    window = ("min_start_epoch", "first_max_start_epoch", "grown")
    more = ("lr_labels", "momentum_labels", "guard", "init")
    common = (0.01, 10_000)
    right, alpha = "correct", 0.3
    assert table_of(DATM, *window, *more, "experts.training.alpha", "experts.training.epochs") == {
        name: (*row[:7], *common, *row[7:11], 0.9, *row[11:], alpha, 100, True)
        for name, row in {
            "cifar10/ipc1": (1, 80, 2, 4, 10, 100, 1e-7, 0, None, None, 5, 1.1, right),
            "cifar10/ipc10": (10, 80, 2, 20, 100, 100, 1e-5, 0, 10, 1000, 2, 1, right),
            "cifar10/ipc50": (50, 80, 2, 40, 500, 1000, 1e-5, 0, 20, 2000, 2, 1, right),
            "cifar10/ipc500": (500, 40, 2, 60, 1000, 50, 1e-5, 40, None, None, 10, 1, right),
            "cifar10/ipc1000": (1000, 100, 2, 60, 1000, 50, 1e-5, 40, None, None, 10, 1, right),
            "cifar100/ipc1": (1, 40, 3, 20, None, 1000, 1e-5, 0, 10, 1000, 10, 1, right),
            "cifar100/ipc10": (10, 80, 2, 50, 1000, 1000, 1e-5, 0, 30, 2000, 10, 1, right),
            "cifar100/ipc50": (50, 80, 2, 70, 1000, 1000, 1e-5, 20, None, None, 10, 1, "random"),
            "cifar100/ipc100": (100, 80, 2, 70, 1000, 50, 1e-5, 30, None, None, 10, 1, right),
            "tiny_imagenet/ipc1": (1, 40, 2, 20, None, 10_000, 1e-4, 0, 15, 2000, 10, 1, right),
            "tiny_imagenet/ipc10": (10, 40, 2, 50, 500, 100, 1e-4, 10, None, None, 10, 1, right),
            "tiny_imagenet/ipc50": (50, 20, 2, 70, 1000, 100, 1e-4, 40, None, None, 10, 1, right),
        }.items()
    }
