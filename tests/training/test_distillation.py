import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.training import Distillation


def logits(seed, count=5, classes=4):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"temperature": 1.0}, 0.46211716),
        ({"temperature": 20.0}, 0.00124973965),
        ({"temperature": 30.0}, 0.00055550412),
        ({"temperature": 20.0, "squared": True}, 0.49989586),
    ],
    ids=str,
)
def test_divergences_by_hand(settings, value):
    # logits (1, 0) against (0, 1): the probabilities differ by tanh(1 / 2T), their logarithms by 1 / T
    student, teacher = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    kind = Distillation(**settings)
    assert float(kind.loss(student, teacher)) == pytest.approx(value, rel=1e-7)
    assert float(kind.loss(student.float(), teacher.float())) == pytest.approx(value, rel=2e-4)
    factor = kind.temperature**2 if kind.squared else 1
    assert value == pytest.approx(factor * math.tanh(0.5 / kind.temperature) / kind.temperature, rel=1e-7)


def test_the_sum_over_images_is_batchmean_times_their_number():
    student, teacher = logits(0), logits(1)
    expected = kl_div(log_softmax(student / 3, 1), softmax(teacher / 3, 1), reduction="batchmean") * 5
    assert torch.allclose(Distillation(temperature=3.0).loss(student, teacher), expected, rtol=1e-12)


def test_the_teacher_is_the_first_argument_of_the_divergence():
    student, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    kind = Distillation(temperature=1.0)
    p = softmax(student, 1)[0]
    assert float(kind.loss(student, teacher)) == pytest.approx(float(-(0.5 * (2 * p).log()).sum()), rel=1e-5)
    assert float(kind.loss(student, teacher)) != pytest.approx(float(kind.loss(teacher, student)), rel=0.1)
    assert float(kind.loss(student, student)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("soft", [False, True])
def test_a_share_of_the_loss_may_be_hard(soft):
    student, teacher, classes = logits(0), logits(1), torch.tensor([0, 3, 1, 1, 2])
    classes = softmax(logits(2), 1) if soft else classes
    plain, kind = Distillation(temperature=2.0, squared=True), {"temperature": 2.0, "squared": True}
    hard = cross_entropy(student, classes, reduction="sum")
    for share in (0.3, 1.0):
        expected = (1 - share) * plain.loss(student, teacher) + share * hard
        mixed = Distillation(hard_share=share, **kind)
        assert torch.allclose(mixed.loss(student, teacher, classes), expected, rtol=1e-12)
        with pytest.raises(InvalidSetting, match=r"Distillation\.hard_share.*lessons that carry classes"):
            mixed.loss(student, teacher)
    assert torch.equal(plain.loss(student, teacher, classes), plain.loss(student, teacher))


def test_only_the_student_learns_and_its_gradient_is_known():
    student, teacher = logits(0).requires_grad_(), logits(1)
    Distillation(temperature=4.0).loss(student, teacher).backward()
    expected = (softmax(student / 4, 1) - softmax(teacher / 4, 1)) / 4
    assert torch.allclose(student.grad, expected.detach(), rtol=1e-10)


def test_logits_of_other_shape_are_refused():
    with pytest.raises(ShapeMismatch, match="teacher"):
        Distillation().loss(logits(0), logits(1, classes=1))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"hard_share": -0.1}, {"hard_share": 1.1}, {"squared": 1}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidSetting, match=rf"Distillation\.{next(iter(settings))}"):
        Distillation(**settings)


def test_settings_are_plain_on_disk_and_documented():
    kind = Distillation(temperature=7.0, squared=True, hard_share=0.25)
    assert from_dict(Distillation, json.loads(json.dumps(to_dict(kind)))) == kind
    assert all(field.doc for field in describe(Distillation))
