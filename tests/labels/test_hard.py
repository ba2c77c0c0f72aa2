import pytest
import torch

from dsdistill.errors import BadData, InvalidSetting
from dsdistill.labels import KINDS, HardLabels


def test_targets_follow_the_owners_of_decoded_images():
    labels = HardLabels(torch.tensor([2, 0, 1]), 4)
    assert labels.target(torch.tensor([1, 1, 0, 2])).tolist() == [0, 0, 2, 1]
    assert labels.target(torch.tensor([0])).dtype == torch.int64
    assert labels.classes.tolist() == [2, 0, 1]
    assert (labels.count, labels.num_classes) == (3, 4)
    assert list(labels.parameters()) == []  # nothing to learn


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_will_do_and_int32_is_stored(dtype):
    labels = HardLabels(torch.tensor([2, 0], dtype=dtype), 3)
    assert labels.tensors()["classes"].tolist() == [2, 0]
    assert labels.tensors()["classes"].dtype == torch.int32
    assert labels.nbytes == 8


def test_restoring_what_was_stored():
    labels = HardLabels(torch.tensor([1, 0, 1]), 5)
    again = HardLabels.restore(labels.tensors(), labels.settings())
    assert (again.classes.tolist(), again.classes.dtype, again.num_classes) == ([1, 0, 1], torch.int64, 5)
    assert labels.settings() == {"num_classes": 5}
    assert KINDS["hard"] is HardLabels


def test_given_classes_are_copied():
    given = torch.tensor([1, 0])
    labels = HardLabels(given, 2)
    part = labels.subset(torch.tensor([0]))
    given.zero_()
    labels.classes.fill_(0)
    assert part.classes.tolist() == [1]
    assert HardLabels(given, 2).classes is not given


def test_subsets_and_joins_keep_the_number_of_classes():
    labels = HardLabels(torch.tensor([2, 0, 1]), 7)
    part = labels.subset(torch.tensor([2, 2]))
    assert (part.classes.tolist(), part.num_classes) == ([1, 1], 7)
    joined = HardLabels.join([part, labels])
    assert (joined.classes.tolist(), joined.num_classes) == ([1, 1, 2, 0, 1], 7)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.tensor([0, 3]), r"span \[0, 3\], but there are 3 classes"),
        (torch.tensor([-1, 2]), r"span \[-1, 2\]"),
        (torch.tensor([0.0, 1.0]), r"must be \(N,\) integers, got \(2,\) torch\.float32"),
        (torch.tensor([[0], [1]]), r"must be \(N,\) integers, got \(2, 1\)"),
        (torch.tensor(1), "must be"),
    ],
    ids=["too large", "negative", "float", "matrix", "scalar"],
)
def test_labels_that_name_no_class_are_refused(classes, message):
    with pytest.raises(BadData, match=message):
        HardLabels(classes, 3)


def test_the_largest_label_is_one_less_than_the_classes():
    assert HardLabels(torch.tensor([0, 2]), 3).classes.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "message"),
    [
        ({"labels": torch.tensor([0])}, {"num_classes": 2}, BadData, "one tensor 'classes'"),
        ({"classes": torch.tensor([0])}, {}, InvalidSetting, "num_classes = None"),
        ({"classes": torch.tensor([0])}, {"num_classes": 2.0}, InvalidSetting, r"num_classes = 2\.0"),
        ({"classes": torch.tensor([2])}, {"num_classes": 2}, BadData, "2 classes"),
    ],
)
def test_content_of_another_make_is_refused(tensors, settings, error, message):
    with pytest.raises(error, match=message):
        HardLabels.restore(tensors, settings)
