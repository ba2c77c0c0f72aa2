import math
from collections import Counter

import pytest
import torch

from dsdistill.augmentations import Siamese, SiameseViews, transforms
from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import InvalidSetting, ShapeMismatch, UnknownName

SHAPE = (3, 32, 32)
OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count, shape=SHAPE, dtype=torch.float32):
    return torch.randn(count, *shape, generator=seeded(9), dtype=dtype)


def draw(op, count=20_000, shape=SHAPE):
    views = Siamese(ops=(op,)).sample(count, shape, seeded())
    assert views.ops == (op,) * count
    return views.values.double()


@pytest.mark.parametrize("op", OPS)
def test_one_record_shows_one_image_and_256_copies_alike(op):
    augmentation, image = Siamese(ops=(op,)), pictures(1)
    views = augmentation.sample(1, SHAPE, seeded(2))
    alone = augmentation.apply(image, views, [0])
    together = augmentation.apply(image.expand(256, -1, -1, -1), views, [0] * 256)
    assert torch.equal(together, alone.expand_as(together))


def slowly(op, image, u, v, w):
    if op == "color":
        return transforms.color(image, u, v, w)
    if op == "crop":
        return transforms.crop(image, u, v)
    if op == "cutout":
        return transforms.cutout(image, u, v, (16, 16))
    if op == "scale":
        return transforms.scale(image, u, v)
    return transforms.flip(image, u) if op == "flip" else transforms.rotate(image, u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bucketed_images_equal_a_loop_over_images(dtype):
    augmentation, count = Siamese(), 40
    views = augmentation.sample(count, SHAPE, seeded(1))
    assert set(views.ops) == set(OPS)
    owner = torch.randint(count, (60,), generator=seeded(2))
    images = pictures(60, dtype=dtype)
    shown = augmentation.apply(images, views, owner)
    for image, group, result in zip(images, owner.tolist(), shown, strict=True):
        expected = slowly(views.ops[group], image[None], *views.values[group].to(dtype)[:, None])
        torch.testing.assert_close(result, expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(augmentation.apply(images, views, owner.tolist()), shown)


def test_without_owner_each_image_has_its_own_record():
    augmentation = Siamese()
    views, images = augmentation.sample(30, SHAPE, seeded(3)), pictures(30)
    assert torch.equal(augmentation.apply(images, views), augmentation.apply(images, views, range(30)))


def test_per_image_shares_the_operation_and_nothing_else():
    augmentation, seen = Siamese(), set()
    for seed in range(40):
        views = augmentation.sample(8, SHAPE, seeded(seed), per="image")
        assert len(set(views.ops)) == 1
        seen.add(views.ops[0])
        if views.ops[0] in ("color", "scale", "rotate"):
            assert len(views.values[:, 0].unique()) == 8
    assert seen == set(OPS)


def test_operations_are_drawn_uniformly():
    views = Siamese().sample(60_000, SHAPE, seeded(4))
    counts = Counter(views.ops)
    assert set(counts) == set(OPS)
    for op in OPS:
        assert counts[op] / 60_000 == pytest.approx(1 / 6, abs=0.01)
    flipped = sum(value for op, value in zip(views.ops, views.values[:, 0].tolist(), strict=True) if op == "flip")
    assert flipped / 60_000 == pytest.approx(1 / 12, abs=0.01)


def assert_uniform(values, low, high):
    assert low <= values.min() < low + 0.01 * (high - low)
    assert high >= values.max() > high - 0.01 * (high - low)
    assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.02)


def test_ranges_of_continuous_parameters():
    brightness, saturation, contrast = draw("color").unbind(1)
    assert_uniform(brightness, -0.5, 0.5)
    assert_uniform(saturation, 0, 2)
    assert_uniform(contrast, 0.5, 1.5)
    across, down, unused = draw("scale").unbind(1)
    assert_uniform(across, 1 / 1.2 - 1e-6, 1.2)
    assert_uniform(down, 1 / 1.2 - 1e-6, 1.2)
    assert abs(torch.corrcoef(torch.stack([across, down]))[0, 1]) < 0.03
    assert not unused.any()
    assert_uniform(draw("rotate")[:, 0], -math.radians(15), math.radians(15))


@pytest.mark.parametrize(
    ("op", "shape", "rows", "columns"),
    [
        ("crop", (3, 32, 32), (-4, 4), (-4, 4)),
        ("crop", (3, 64, 28), (-8, 8), (-4, 4)),
        ("cutout", (3, 32, 32), (0, 32), (0, 32)),
        ("cutout", (3, 9, 16), (0, 8), (0, 16)),
    ],
)
def test_ranges_of_whole_parameters(op, shape, rows, columns):
    values = draw(op, shape=shape)
    for column, (low, high) in zip(values.unbind(1), (rows, columns), strict=False):
        found, counts = column.unique(return_counts=True)
        assert found.tolist() == list(range(low, high + 1))
        assert counts.min() > 0.75 * counts.float().mean()
        assert counts.max() < 1.25 * counts.float().mean()


def test_settings_reach_the_draw_and_the_images():
    views = Siamese(ops=("color",), brightness=4.0, saturation=1.0, contrast=0.9).sample(20_000, SHAPE, seeded())
    brightness, saturation, contrast = views.values.double().unbind(1)
    assert_uniform(brightness, -2, 2)
    assert_uniform(saturation, 0, 1)
    assert_uniform(contrast, 0.9, 1.9)
    narrow = Siamese(ops=("cutout",), cutout_ratio=0.25)
    record = SiameseViews(SHAPE, 1, ("cutout",), torch.tensor([[16.0, 16.0, 0.0]]))
    assert (narrow.apply(torch.ones(1, *SHAPE), record) == 0).sum() == 3 * 64
    assert draw("crop", shape=(3, 4, 4))[:, 0].abs().max() == 1
    assert not Siamese(ops=("crop",), crop_ratio=0.0).sample(9, SHAPE, seeded()).values.any()
    assert Siamese(ops=("scale",), scale=1.0).sample(9, SHAPE, seeded()).values[:, :2].eq(1).all()
    assert not Siamese(ops=("rotate",), rotate=0.0).sample(9, SHAPE, seeded()).values.any()


def test_sampling_is_determined_by_its_generator_and_disturbs_no_other():
    state = torch.get_rng_state()
    one, two = (Siamese().sample(50, SHAPE, seeded(6)) for _ in range(2))
    Siamese().apply(pictures(50), one)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.ops == two.ops
    assert torch.equal(one.values, two.values)
    other = Siamese().sample(50, SHAPE, seeded(7))
    assert other.ops != one.ops
    assert not torch.equal(other.values, one.values)


def test_gradients_pass_through_all_operations():
    augmentation = Siamese()
    views = augmentation.sample(12, (2, 4, 4), seeded(3))
    assert len(set(views.ops)) == 6
    images = pictures(12, (2, 4, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augmentation.apply(x, views), images)


def test_flips_are_dropped_where_mirrors_change_the_class():
    assert Siamese().suited(mirror_safe=True) == Siamese()
    assert Siamese(rotate=3.0).suited(mirror_safe=False) == Siamese(
        ops=("color", "crop", "cutout", "scale", "rotate"), rotate=3.0
    )
    assert Siamese(ops=("flip",)).suited(mirror_safe=False) is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ops": ("color", "blur")}, UnknownName),
        ({"ops": ()}, InvalidSetting),
        ({"ops": ("flip", "flip")}, InvalidSetting),
        ({"scale": 0.9}, InvalidSetting),
        ({"rotate": 181.0}, InvalidSetting),
        ({"crop_ratio": 1.1}, InvalidSetting),
        ({"cutout_ratio": -0.1}, InvalidSetting),
        ({"brightness": -1.0}, InvalidSetting),
    ],
)
def test_bad_settings_are_refused(arguments, error):
    with pytest.raises(error):
        Siamese(**arguments)


def test_bad_arguments_are_refused():
    augmentation = Siamese()
    views = augmentation.sample(2, SHAPE, seeded())
    with pytest.raises(InvalidSetting, match="'class' or 'image'"):
        augmentation.sample(2, SHAPE, seeded(), per="batch")
    with pytest.raises(InvalidSetting, match="at least one group"):
        augmentation.sample(0, SHAPE, seeded())
    with pytest.raises(ShapeMismatch, match=r"\(M, 3, 32, 32\)"):
        augmentation.apply(torch.zeros(2, 3, 16, 16), views)
    with pytest.raises(ShapeMismatch, match=r"\(3,\), one group per image"):
        augmentation.apply(pictures(3), views)
    with pytest.raises(ShapeMismatch, match=r"\(3,\), one group per image"):
        augmentation.apply(pictures(3), views, [0, 1])
    for owner in ([0, 1, 2], [0, -1, 1]):
        with pytest.raises(ShapeMismatch, match="each owner"):
            augmentation.apply(pictures(3), views, owner)


def test_a_generator_elsewhere_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(InvalidSetting, match="generator on the CPU"):
        Siamese().sample(2, SHAPE, Elsewhere())


def test_settings_are_plain_on_disk_and_documented():
    augmentation = Siamese(ops=("crop", "flip"), crop_ratio=0.25)
    assert from_dict(Siamese, to_dict(augmentation)) == augmentation
    assert all(field.doc for field in describe(Siamese))
