import pytest
import torch

from dsdistill.errors import BadData, InvalidSetting
from dsdistill.labels import KINDS, HardLabels, SoftLabels

HARD = HardLabels(torch.tensor([2, 0, 1]), 4)


def test_targets_are_the_softmax_of_the_learned_logits():
    logits = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    labels = SoftLabels(logits, torch.tensor([1, 0]))
    made = labels.target(torch.tensor([1, 0, 0]))
    assert made[0].tolist() == [0.5, 0.5]
    assert made[1, 1].item() == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()))
    assert torch.equal(made[1], made[2])
    (-made[1, 0].log()).backward()
    assert labels.logits.grad[1].tolist() == [0, 0]
    assert labels.logits.grad[0].tolist() == pytest.approx([-made[1, 1].item(), made[1, 1].item()])


@pytest.mark.parametrize("confidence", [0.3, 0.9, 0.99])
def test_a_start_from_hard_labels_has_the_confidence_asked_for(confidence):
    target = SoftLabels.from_hard(HARD, confidence).target(torch.arange(3))
    expected = torch.full((3, 4), (1 - confidence) / 3)
    expected[torch.arange(3), HARD.classes] = confidence
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("confidence", [0.25, 1.0, 0.0])
def test_an_impossible_confidence_is_refused(confidence):
    with pytest.raises(InvalidSetting, match="confidence"):
        SoftLabels.from_hard(HARD, confidence)


def test_the_class_of_an_item_is_what_it_was_made_for():
    labels = SoftLabels.from_hard(HARD)
    labels.logits.data[0] = torch.tensor([9.0, 0, 0, 0])
    assert labels.classes.tolist() == [2, 0, 1]


def test_restoring_subsets_and_joins():
    labels = SoftLabels.from_hard(HARD)
    again = SoftLabels.restore(labels.tensors(), labels.settings())
    assert torch.equal(again.logits, labels.logits)
    assert (again.classes.tolist(), again.num_classes, again.count) == ([2, 0, 1], 4, 3)
    assert labels.nbytes == 3 * 4 * 4 + 3 * 4
    part = labels.subset(torch.tensor([2, 0]))
    assert part.classes.tolist() == [1, 2]
    assert SoftLabels.join([part, labels]).classes.tolist() == [1, 2, 2, 0, 1]
    part.logits.data.zero_()
    assert float(labels.logits.detach().max()) > 1
    assert KINDS["soft"] is SoftLabels
    assert [name for name, _ in labels.named_parameters()] == ["logits"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, "'classes' and 'logits'"),
        ({"logits": torch.zeros(2, 3), "classes": torch.tensor([0])}, r"\(N, K\)"),
        ({"logits": torch.zeros(2), "classes": torch.tensor([0, 1])}, r"\(N, K\)"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int32), "classes": torch.tensor([0, 1])}, "floating-point"),
        ({"logits": torch.full((2, 3), torch.nan), "classes": torch.tensor([0, 1])}, "NaN"),
        ({"logits": torch.zeros(2, 3), "classes": torch.tensor([0, 3])}, r"\[0, 3\], but there are 3"),
    ],
    ids=["one tensor", "too few classes", "vector", "integers", "nan", "class beyond"],
)
def test_content_of_another_make_is_refused(tensors, message):
    with pytest.raises(BadData, match=message):
        SoftLabels.restore(tensors, {})
