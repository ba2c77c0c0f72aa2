import pytest
import torch
from conftest import make_images

from dsdistill import synthesize
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.methods import RandomReal


def numbered(counts=(5, 3, 4)):
    """Image i is filled with the value i."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.arange(len(targets), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    return ImageSource("numbered", [f"class {index}" for index in range(len(counts))], images, targets)


def drawn(made):
    """The number of each image of a set."""
    return made.normalization.to_uint8(made.tensors()[0])[:, 0, 0, 0].tolist()


def test_real_images_distinct_and_of_their_class():
    source = numbered()
    for seed in range(20):
        made = synthesize(RandomReal(ipc=3), source, seed=seed)
        assert made.targets == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        numbers = drawn(made)
        assert len(set(numbers)) == 9
        assert [int(source.targets[number]) for number in numbers] == made.targets


def test_images_are_those_of_the_source_to_the_last_bit(source):
    made = synthesize(RandomReal(ipc=2), source)
    real = source.normalization.standardize(source.images)
    for image in made.tensors()[0]:
        assert bool((real == image).flatten(1).all(1).any())


def test_every_image_is_drawn_equally_often():
    # 200 seeds: an image of class 0 (2 of 5) is expected 80 times, of class 1 (2 of 3) 133, of class 2 (2 of 4) 100;
    # five deviations are 35, 33 and 35. Seeds are fixed.
    counts = torch.zeros(12)
    for seed in range(200):
        counts[drawn(synthesize(RandomReal(ipc=2), numbered(), seed=seed))] += 1
    expected = torch.tensor([80.0] * 5 + [400 / 3] * 3 + [100.0] * 4)
    assert float((counts - expected).abs().max()) < 35


def test_small_classes():
    with pytest.raises(BadData, match=r"'class 1' \(3\), 'class 2' \(4\).*on_small_class"):
        synthesize(RandomReal(ipc=5), numbered())
    assert sorted(drawn(synthesize(RandomReal(ipc=6, on_small_class="cap"), numbered()))) == list(range(12))
    repeated = drawn(synthesize(RandomReal(ipc=7, on_small_class="duplicate"), numbered()))
    assert sorted(set(repeated)) == list(range(12))
    assert repeated[7:10] == repeated[10:13]
    assert repeated[13] == repeated[7]


def test_one_class_and_one_pixel_work():
    source = ImageSource("one", ["only"], *make_images(4, 1, (1, 1, 1), seed=0))
    assert synthesize(RandomReal(ipc=2), source).targets == [0, 0]


@pytest.mark.parametrize("ipc", [0, -1, 1.5, "1", True])
def test_ipc_is_a_positive_whole_number(ipc):
    with pytest.raises(InvalidSetting, match=r"RandomReal\.ipc = "):
        RandomReal(ipc=ipc)
