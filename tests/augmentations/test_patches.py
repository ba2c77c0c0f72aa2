import json
from collections import Counter
from itertools import permutations

import pytest
import torch
from scipy import stats

from dsdistill.augmentations import Augmentation, PatchShuffle, ResizedCrop, Siamese
from dsdistill.core.config import from_dict, to_dict
from dsdistill.errors import InvalidSetting, ShapeMismatch

SHAPE = (2, 7, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count, shape=SHAPE):
    return torch.randn(count, *shape, generator=seeded(9))


def shuffled(image, factor, across, down):
    """Strips cut out and put together again, columns first."""
    image = torch.cat([torch.tensor_split(image, factor, 2)[strip] for strip in across], 2)
    return torch.cat([torch.tensor_split(image, factor, 1)[strip] for strip in down], 1)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_every_image_is_one_of_the_shuffled_ones(factor):
    shuffle, images = PatchShuffle(factor), pictures(40)
    shown = shuffle.apply(images, shuffle.sample(40, SHAPE, seeded(1), per="image"))
    orders = list(permutations(range(factor)))
    found = Counter()
    for image, result in zip(images, shown, strict=True):
        matching = [(a, d) for a in orders for d in orders if torch.equal(shuffled(image, factor, a, d), result)]
        assert len(matching) == 1
        found[matching[0]] += 1
    assert len(found) > (1 if factor > 1 else 0)
    assert len(orders) ** 2 >= len(found)


def test_orders_are_uniform_and_independent():
    shape = (1, 6, 6)
    views = PatchShuffle(3).sample(7200, shape, seeded(2), per="image")
    found = Counter(
        zip(map(tuple, views.rows[:, ::2].tolist()), map(tuple, views.columns[:, ::2].tolist()), strict=True)
    )
    assert len(found) == 36
    assert stats.chisquare(list(found.values())).pvalue > 1e-3


def test_the_first_strips_are_the_wider_ones():
    views = PatchShuffle(3).sample(100, (1, 3, 8), seeded(3))
    orders = {tuple(row) for row in views.columns.tolist()}
    strips = ([0, 1, 2], [3, 4, 5], [6, 7])
    assert orders == {tuple(pixel for strip in order for pixel in strip) for order in permutations(strips)}


def test_classes_share_and_images_do_not():
    shuffle, images = PatchShuffle(2), pictures(6)
    views = shuffle.sample(2, SHAPE, seeded(4))
    owner = [0, 1, 1, 0, 1, 0]
    shown = shuffle.apply(images, views, owner)
    for row, group in enumerate(owner):
        assert torch.equal(shown[row], shuffle.apply(images[row : row + 1], views, [group])[0])


def test_then_the_result_is_shown_under_another_view():
    inner = ResizedCrop(scale=(0.5, 1.0))
    shuffle, images = PatchShuffle(2, then=inner), pictures(5)
    views = shuffle.sample(5, SHAPE, seeded(5), per="image")
    plain = PatchShuffle(2).sample(5, SHAPE, seeded(5), per="image")
    expected = inner.apply(PatchShuffle(2).apply(images, plain), views.then)
    assert torch.equal(shuffle.apply(images, views), expected)
    assert shuffle.suited(True) == shuffle
    assert shuffle.suited(False) == PatchShuffle(2, then=ResizedCrop(scale=(0.5, 1.0), flip=0.0))
    assert PatchShuffle(2, then=Siamese(("flip",))).suited(False) == PatchShuffle(2)
    assert from_dict(Augmentation, json.loads(json.dumps(to_dict(shuffle)))) == shuffle
    with pytest.raises(InvalidSetting, match=r"PatchShuffle\.sample drew"):
        shuffle.apply(images, plain)


def test_pixels_keep_their_gradients():
    images = pictures(3).double().requires_grad_()
    views = PatchShuffle(3).sample(3, SHAPE, seeded(6), per="image")
    assert torch.autograd.gradcheck(lambda x: PatchShuffle(3).apply(x, views), images)


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidSetting, match=r"PatchShuffle\.factor"):
        PatchShuffle(0)
    with pytest.raises(InvalidSetting, match="at most the 7 pixels"):
        PatchShuffle(8).sample(1, SHAPE, seeded())
    with pytest.raises(InvalidSetting, match="at least one group"):
        PatchShuffle().sample(0, SHAPE, seeded())
    with pytest.raises(ShapeMismatch):
        PatchShuffle().apply(pictures(3), PatchShuffle().sample(2, SHAPE, seeded()))
