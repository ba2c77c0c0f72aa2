import torch

from dsdistill.data import ImageSource, overlap
from dsdistill.data.duplicates import Overlap


def source(values, shape=(1, 2, 2)):
    """One image for each value, filled with it."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *shape)
    return ImageSource("numbers", ["all"], images, torch.zeros(len(values), dtype=torch.int64))


def test_equal_images_are_counted_within_and_between():
    assert overlap(source([1, 2, 3]), source([4, 5])) == Overlap(0, 0)
    assert overlap(source([1, 2, 2, 2]), source([2, 2, 7])) == Overlap(2, 2)


def test_one_bit_makes_another_image():
    first = source([0, 1])
    images = first.images.clone()
    images[0, 0, 1, 1] = 1
    assert overlap(first, ImageSource("changed", ["all"], images, first.targets)) == Overlap(0, 1)
