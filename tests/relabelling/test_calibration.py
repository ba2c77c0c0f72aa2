"""FerKD."""

import math

import pytest
import torch

from dsdistill.errors import InvalidSetting
from dsdistill.relabelling import FerKD

# probability of the true class, 0, in four views of three classes
SURE = torch.tensor([[0.995, 0.004, 0.001], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.04, 0.95, 0.01]])
OWN = torch.zeros(4, dtype=torch.int64)


def test_views_are_left_out_softened_or_believed():
    labels, kept = FerKD().calibrated(SURE.log(), OWN)
    assert kept.tolist() == [False, True, True, False]
    assert torch.equal(labels[1], SURE.log()[1])
    assert labels[2].softmax(0).tolist() == pytest.approx([0.9, 0.05, 0.05])


def test_the_largest_probability_may_be_the_confidence():
    labels, kept = FerKD(confidence="max").calibrated(SURE.log(), OWN)
    assert kept.tolist() == [False, True, True, True]
    assert torch.equal(labels[1:], SURE.log()[1:])  # none below the middle
    labels, kept = FerKD(confidence="max", middle=0.6).calibrated(SURE.log(), OWN)
    assert kept.tolist() == [False, True, True, True]
    assert labels[1].softmax(0).tolist() == pytest.approx([0.9, 0.05, 0.05])  # the true class, not the largest
    assert torch.equal(labels[2:], SURE.log()[2:])


def test_thresholds_belong_to_what_is_above_low_and_below_middle():
    exact = torch.tensor([[math.log(3.0), 0.0]]).double()  # 3/4
    at = float(exact.softmax(1)[0, 0])
    own = OWN[:1]
    assert FerKD(low=at, middle=0.9).calibrated(exact, own)[1].item()
    assert torch.equal(FerKD(low=0.1, middle=at).calibrated(exact, own)[0], exact)
    assert FerKD(low=0.1, middle=0.2, top=at).calibrated(exact, own)[1].item()


def test_the_softened_class_is_a_distribution():
    labels, _ = FerKD(eps=0.3, middle=0.6).calibrated(SURE.log(), OWN)
    assert labels[1].exp().tolist() == pytest.approx([0.7, 0.15, 0.15])


@pytest.mark.parametrize("wrong", [{"low": 0.3}, {"middle": 0.99}, {"top": 0.2}, {"eps": 0.0}, {"confidence": "mean"}])
def test_thresholds_ascend(wrong):
    with pytest.raises(InvalidSetting):
        FerKD(**wrong)
