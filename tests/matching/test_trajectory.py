"""The parts of an outer step of trajectory matching."""

from dataclasses import replace

import pytest
import torch
from methods.stepping import begin, run_of

from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Experts, PlainTraining
from dsdistill.matching.trajectory import StepSize, distance, mini_batches
from dsdistill.methods import MTT
from dsdistill.networks import NetworkSpec

SMALL = NetworkSpec(width=4, depth=1)
FEW = Experts(count=3, training=PlainTraining(epochs=4, batch_size=12, lr=0.05))
METHOD = MTT(ipc=2, iterations=4, student_steps=3, max_start_epoch=3, network=SMALL, experts=FEW)


def test_every_item_is_used_once_before_any_is_used_again():
    batches = mini_batches(7, 3, 6, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [1, 3, 3, 1, 3, 3]
    for first in (0, 3):
        assert sorted(torch.cat(batches[first : first + 3]).tolist()) == list(range(7))
    assert torch.cat(batches[:3]).tolist() != torch.cat(batches[3:]).tolist()


def test_mini_batches_larger_than_the_set_are_the_set():
    assert [len(batch) for batch in mini_batches(4, 10, 2, torch.Generator().manual_seed(0))] == [4, 4]


def test_the_step_size_is_its_parameter_down_to_its_start_and_positive_below():
    rate = StepSize(0.02)
    for raw, expected in ((0.02, 0.02), (0.05, 0.05), (7.0, 7.0), (0.0, 0.01), (-0.5, 0.02 / 27)):
        rate.raw.data.fill_(raw)
        assert rate().item() == pytest.approx(expected, rel=1e-5)
        assert rate().item() > 0


def test_the_step_size_can_come_back_from_far_below():
    rate = StepSize(0.02)
    rate.raw.data.fill_(-200 * 0.02)
    rate().backward()
    assert rate().item() == pytest.approx(0.02 / 202, rel=1e-5)
    assert float(rate.raw.grad) > 1e-5
    rate.raw.data.fill_(-1e6)
    assert rate().item() > 0


@pytest.mark.parametrize("raw", [0.02, 0.019999, 0.03])
def test_the_slope_of_the_step_size_is_1_at_its_start_so_published_step_sizes_hold(raw):
    rate = StepSize(0.02)
    rate.raw.data.fill_(raw)
    rate().backward()
    assert float(rate.raw.grad) == pytest.approx(1, abs=1e-3)


def test_distance_is_1_for_who_stands_still_and_0_for_who_arrives():
    start, target = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert float(distance(start, start, target)) == 1
    assert float(distance(target, start, target)) == 0
    assert float(distance(start + 0.5 * (target - start), start, target)) == pytest.approx(0.25)


def test_experts_serve_in_turn_and_starts_lie_in_the_window(source):
    run = run_of(source)
    found = [METHOD.segment(run, iteration) for iteration in range(30)]
    for turn in range(10):
        assert sorted(one.expert for one in found[3 * turn : 3 * turn + 3]) == [0, 1, 2]
    assert len({tuple(one.expert for one in found[3 * turn : 3 * turn + 3]) for turn in range(10)}) > 1
    assert {one.epoch for one in found} == {0, 1, 2}
    assert {METHOD.segment(run, iteration, 1).epoch for iteration in range(10)} == {0}


def test_a_segment_gives_the_snapshots_of_its_expert(source):
    segment = METHOD.segment(run_of(source), 5)
    start, later = segment.after(0, 2)
    kept = segment.trajectories.snapshots(segment.expert, [segment.epoch, segment.epoch + 2])
    assert torch.equal(start, kept[0])
    assert torch.equal(later, kept[1])
    assert not torch.equal(start, later)


@pytest.mark.parametrize(
    ("precision", "lr", "setting", "mend"),
    [
        ("float16", 1e-9, "experts.precision", "take 'float32'.* or raise experts.training.lr = 1e-09"),
        ("float32", 1e-30, "experts.training.lr", "raise it"),
    ],
)
def test_an_expert_that_stands_still_is_refused(source, precision, lr, setting, mend):
    training = PlainTraining(epochs=4, batch_size=12, lr=lr)
    method = replace(METHOD, experts=Experts(count=1, precision=precision, training=training))
    run = run_of(source)
    segment = method.segment(run, 0)
    with pytest.raises(InvalidSetting, match=rf"same parameters after epochs {segment.epoch} and .*{mend}") as caught:
        method.step(run, begin(method, run), 0)
    assert caught.value.setting == setting


def test_the_loss_falls_below_1_as_the_images_learn(source):
    method = MTT(
        ipc=2,
        student_steps=5,
        max_start_epoch=1,
        lr_images=5.0,
        lr_student=0.05,
        augmentation=None,
        network=SMALL,
        experts=FEW,
    )
    run = run_of(source)
    state = begin(method, run)
    losses = [float(method.step(run, state, iteration)["loss"]) for iteration in range(60)]
    assert sum(losses[-6:]) / 6 < min(0.9, sum(losses[:6]) / 6)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"min_start_epoch": 3}, "min_start_epoch"),
        ({"max_start_epoch": 4}, "max_start_epoch"),
        ({"expert_epochs": 3}, "max_start_epoch"),
    ],
)
def test_windows_that_do_not_fit_are_refused(source, settings, name):
    with pytest.raises(InvalidSetting, match=name):
        replace(METHOD, **settings).check(source)


def test_one_class_is_refused(source):
    from dsdistill.data import ImageSource

    one = ImageSource("one", ["only"], source.images[:12], torch.zeros(12, dtype=torch.int64))
    with pytest.raises(BadData, match="one class"):
        METHOD.check(one)
