import json
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch.nn.functional import interpolate
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

from dsdistill.augmentations import Augmentation, CropViews, PadCrop, ResizedCrop, Siamese, least_share
from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

SHAPE = (3, 12, 20)
CROPS = [ResizedCrop(shift=3), ResizedCrop(shift=5, shift_both=True), ResizedCrop(scale=(0.5, 0.9), flip=0.0)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count, dtype=torch.float32, shape=SHAPE):
    return torch.randn(count, *shape, generator=seeded(9), dtype=dtype)


def chain(image, box, flip, shift):
    """The library's steps one after the other, on one image (C, H, W)."""
    top, left, height, width = box
    cut = image[None, :, top : top + height, left : left + width]
    shown = interpolate(cut, image.shape[1:], mode="bilinear", align_corners=False)[0]
    shown = shown.flip(2) if flip else shown
    return torch.roll(shown, tuple(shift), (1, 2))


def chained(images, views):
    rows = zip(images, views.boxes.tolist(), views.flips.tolist(), views.shifts.tolist(), strict=True)
    return torch.stack([chain(*row) for row in rows])


@pytest.mark.parametrize("shape", [SHAPE, (1, 32, 32), (2, 7, 5)], ids=str)
def test_views_are_the_librarys_crop_resize_mirror_and_roll(shape):
    crop = ResizedCrop(shift=4, shift_both=True)
    images = pictures(100, torch.float64, shape)
    views = crop.sample(100, shape, seeded(1), per="image")
    expected = chained(images, views)
    assert {bool(flip) for flip in views.flips} == {True, False}
    assert (crop.apply(images, views) - expected).abs().max() < 1e-12
    assert (crop.apply(images, views, range(100)) - expected).abs().max() < 1e-12
    again = crop.apply(images[:40].repeat(2, 1, 1, 1), views.rows([7]))  # one record for all
    assert (again[40:] - chained(images[:40], views.rows([7] * 40))).abs().max() < 1e-12
    assert torch.equal(again[:40], again[40:])


def test_resizing_agrees_with_torchvision():
    images = pictures(10, torch.float64)
    views = ResizedCrop(flip=0.0).sample(10, SHAPE, seeded(2), per="image")
    for image, box, shown in zip(images, views.boxes.tolist(), ResizedCrop().apply(images, views), strict=True):
        for antialias in (True, False):  # a crop is never larger than the image, so there is nothing to smooth
            expected = resized_crop(image, *box, size=list(SHAPE[1:]), antialias=antialias)
            assert (shown - expected).abs().max() < 1e-12


def test_a_crop_by_hand():
    image = torch.arange(4.0, dtype=torch.float64).view(1, 1, 1, 4)
    shape = (1, 1, 4)
    views = CropViews.of_numbers(torch.tensor([[0, 1, 1, 2, 0, 0, 0]]), shape)  # pixels 1 and 2, at -.25 .25 .75 1.25
    assert ResizedCrop().apply(image, views).flatten().tolist() == [1.0, 1.25, 1.75, 2.0]
    mirrored = CropViews.of_numbers(torch.tensor([[0, 1, 1, 2, 1, 0, 0]]), shape)
    assert ResizedCrop().apply(image, mirrored).flatten().tolist() == [2.0, 1.75, 1.25, 1.0]
    moved = CropViews.of_numbers(torch.tensor([[0, 1, 1, 2, 1, 0, 1]]), shape)  # mirrored first, then to the right
    assert ResizedCrop().apply(image, moved).flatten().tolist() == [1.0, 2.0, 1.75, 1.25]
    back = CropViews.of_numbers(torch.tensor([[0, 0, 1, 4, 0, 0, -1]]), shape)
    assert ResizedCrop().apply(image, back).flatten().tolist() == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("crop", CROPS, ids=repr)
def test_views_are_means_of_pixels(crop):
    views = crop.sample(50, SHAPE, seeded(3), per="image")
    ones = torch.ones(50, *SHAPE, dtype=torch.float64)
    for owner in (None, range(50)):
        assert (crop.apply(ones, views, owner) - 1).abs().max() < 1e-15  # rows of A and B have the sum 1
    images = pictures(50)
    assert (crop.apply(images, views) - crop.apply(images, views, range(50))).abs().max() < 1e-5


@pytest.mark.parametrize("crop", [*CROPS, PadCrop()], ids=repr)
def test_an_image_is_shown_alike_alone_and_in_any_batch(crop):
    images = pictures(23)
    views = crop.sample(23, SHAPE, seeded(4), per="image")
    whole = crop.apply(images, views)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop.apply(last, views), whole)
    for size in (1, 2, 7, 16):
        index = torch.randperm(23, generator=seeded(size))
        for part in torch.split(index, size):
            assert torch.equal(crop.apply(images[part], views.rows(part)), whole[part])


def test_groups_share_views_in_one_call():
    crop = ResizedCrop(shift=3)
    images = pictures(9, torch.float64)
    owner = [0, 0, 2, 1, 2, 0, 1, 1, 1]
    views = crop.sample(3, SHAPE, seeded(5))
    expected = chained(images, views.rows(owner))
    for index in (owner, torch.tensor(owner)):
        assert (crop.apply(images, views, index) - expected).abs().max() < 1e-12
    alone = [crop.apply(images[row : row + 1], views, [group])[0] for row, group in enumerate(owner)]
    assert (torch.stack(alone) - expected).abs().max() < 1e-12


def test_views_are_linear_and_can_be_differentiated_twice():
    crop = ResizedCrop(shift=1)
    images = pictures(3, torch.float64, (1, 3, 4)).requires_grad_()
    views = crop.sample(2, (1, 3, 4), seeded(6))
    own = crop.sample(3, (1, 3, 4), seeded(6), per="image")
    for record, owner in ((views, [0, 1, 0]), (views.rows([1]), None), (own, None)):
        assert torch.autograd.gradcheck(lambda x, r=record, o=owner: crop.apply(x, r, o), images)
        assert torch.autograd.gradgradcheck(lambda x, r=record, o=owner: crop.apply(x, r, o).square(), images)


def test_mixed_precision_leaves_views_alone():
    crop = ResizedCrop()
    images, views = pictures(4), crop.sample(1, SHAPE, seeded(7))
    with torch.autocast("cpu", torch.bfloat16):
        shown = crop.apply(images, views)
    assert shown.dtype == torch.float32
    assert torch.equal(shown, crop.apply(images, views))


# Draws -------------------------------------------------------------------------------------------------------


def test_boxes_are_drawn_as_the_librarys_are():
    size, number = 40, 4000
    views = ResizedCrop().sample(number, (3, size, size), seeded(1), per="image")
    image = torch.empty(3, size, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(number)]
    expected = torch.tensor(drawn)
    for column in range(4):
        assert stats.ks_2samp(views.boxes[:, column], expected[:, column]).pvalue > 1e-3
    areas, others = (boxes[:, 2] * boxes[:, 3] for boxes in (views.boxes, expected))
    assert stats.ks_2samp(areas, others).pvalue > 1e-3
    other = ResizedCrop(scale=(0.15, 1.0)).sample(number, (3, size, size), seeded(1), per="image")
    assert stats.ks_2samp(other.boxes[:, 2] * other.boxes[:, 3], others).pvalue < 1e-6  # the test sees a difference
    ratios = (views.boxes[:, 3] / views.boxes[:, 2])[areas < 400].log()  # far from the size, nothing is refused
    assert abs(float(ratios.mean())) < 0.02
    assert float(ratios.min()) < -0.2
    assert float(ratios.max()) > 0.2


@pytest.mark.parametrize("shape", [(3, 12, 20), (3, 30, 8), (1, 5, 5)], ids=str)
def test_boxes_lie_inside_and_have_the_shares_asked_for(shape):
    _, height, width = shape
    views = ResizedCrop(scale=(0.3, 0.6), ratio=(0.8, 1.25)).sample(500, shape, seeded(2), per="image")
    top, left, high, wide = views.boxes.unbind(1)
    assert bool(((top >= 0) & (left >= 0)).all())
    assert bool(((top + high <= height) & (left + wide <= width)).all())
    rounding = 0.5 * (high + wide) + 0.25
    assert bool((high * wide >= 0.3 * height * width - rounding).all())
    assert bool((high * wide <= 0.6 * height * width + rounding).all())
    assert len(set(zip(top.tolist(), left.tolist(), strict=True))) > 3


def test_ratios_are_width_by_height():
    views = ResizedCrop(scale=(0.18, 0.18), ratio=(2.0, 2.0)).sample(9, (3, 40, 40), seeded(2), per="image")
    assert views.boxes[:, 2:].tolist() == [[12, 24]] * 9  # of 1600 pixels, 288


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((3, 10, 40), [0, 13, 10, 13]),  # too wide: ratio 4/3, 13.33 columns
        ((3, 40, 10), [13, 0, 13, 10]),  # too high: ratio 3/4, 13.33 rows
    ],
    ids=str,
)
def test_boxes_that_never_fit_give_the_central_one(shape, box):
    views = ResizedCrop(scale=(0.9, 1.0)).sample(20, shape, seeded(3), per="image")
    assert views.boxes.tolist() == [box] * 20


def test_the_first_box_that_fits_is_taken(monkeypatch):
    draws = torch.zeros(1, 25, dtype=torch.float64)
    draws[0, :10] = torch.tensor([1.0, 1.0, 0.5, 0.2, 0, 0, 0, 0, 0, 0])  # shares of the range of areas
    draws[0, 10:20] = torch.tensor([1.0, 0.0, 0.5, 0.5, 0, 0, 0, 0, 0, 0])  # of the logarithm of ratios
    draws[0, 20:] = torch.tensor([0.5, 0.999, 0.4, 0.0, 0.999])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws)
    views = ResizedCrop(scale=(0.5, 1.0), shift=3).sample(1, (3, 20, 20), seeded())
    # 23.1 x 17.3 and 17.3 x 23.1 do not fit, sqrt(300) = 17.3 does, and leaves 4 places each way
    assert views.boxes.tolist() == [[2, 3, 17, 17]]
    assert views.flips.tolist() == [True]
    assert views.shifts.tolist() == [[0, 3]]
    both = ResizedCrop(scale=(0.5, 1.0), shift=3, shift_both=True).sample(1, (3, 20, 20), seeded())
    assert both.shifts.tolist() == [[-3, 3]]


def test_the_whole_image_is_shown_to_the_last_bit():
    for shape in (SHAPE, (3, 8, 8)):
        crop = ResizedCrop(scale=(1.0, 1.0), flip=0.0)
        images = pictures(5, shape=shape)
        views = crop.sample(5, shape, seeded(), per="image")
        assert torch.equal(crop.apply(images, views), images)
        assert torch.equal(crop.apply(images, views, range(5)), images)


@pytest.mark.parametrize(("both", "values"), [(False, range(4)), (True, range(-3, 4))])
def test_mirrors_and_shifts_are_uniform(both, values):
    views = ResizedCrop(flip=0.3, shift=3, shift_both=both).sample(4000, SHAPE, seeded(4), per="image")
    assert float(views.flips.double().mean()) == pytest.approx(0.3, abs=0.03)
    for column in views.shifts.unbind(1):
        counts = [int((column == value).sum()) for value in values]
        assert sum(counts) == 4000
        assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(float(torch.corrcoef(views.shifts.T.double())[0, 1])) < 0.06
    assert bool((ResizedCrop().sample(50, SHAPE, seeded(4)).shifts == 0).all())


@pytest.mark.parametrize("crop", [ResizedCrop(shift=2), PadCrop()], ids=repr)
def test_sampling_is_determined_by_its_generator_alone(crop):
    state = torch.get_rng_state()
    one, two, other = (crop.sample(6, SHAPE, seeded(seed), per="image").numbers() for seed in (6, 6, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) > 3  # each has its own
    assert torch.equal(crop.sample(6, SHAPE, seeded(6), per="class").numbers(), one)


# Records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [*CROPS, PadCrop()], ids=repr)
def test_records_are_whole_numbers(crop):
    views = crop.sample(30, SHAPE, seeded(8), per="image")
    numbers = views.numbers()
    assert (numbers.dtype, tuple(numbers.shape)) == (torch.int16, (30, 7))
    again = CropViews.of_numbers(numbers, SHAPE)
    assert (again.shape, len(again)) == (SHAPE, 30)
    for name in ("boxes", "flips", "shifts"):
        assert torch.equal(getattr(again, name), getattr(views, name))
        assert getattr(again, name).dtype == getattr(views, name).dtype
    images = pictures(30)
    assert torch.equal(crop.apply(images, again), crop.apply(images, views))
    picked = views.rows(torch.tensor([4, 4, 1]))
    assert torch.equal(picked.numbers(), numbers[[4, 4, 1]])
    assert len(picked) == 3


@pytest.mark.parametrize(
    "numbers",
    [
        torch.zeros(3, 6, dtype=torch.int16),
        torch.zeros(7, dtype=torch.int16),
        torch.ones(3, 7),
        torch.tensor([[0, 0, 0, 5, 0, 0, 0]]),
        torch.tensor([[0, 0, 5, 5, 2, 0, 0]]),
    ],
    ids=["columns", "dimensions", "floats", "empty", "mirrored twice"],
)
def test_numbers_that_are_no_record_are_refused(numbers):
    with pytest.raises(BadData, match="record of crops"):
        CropViews.of_numbers(numbers, SHAPE)


def test_images_too_large_for_a_record_are_refused():
    views = ResizedCrop().sample(1, (3, 40_000, 10), seeded())
    with pytest.raises(InvalidSetting, match="32767 pixels"):
        views.numbers()


# Crops of images in a frame ----------------------------------------------------------------------------------


def test_a_framed_image_is_moved_and_mirrored():
    images = pictures(60)
    crop = PadCrop(pad=4)
    views = crop.sample(60, SHAPE, seeded(1), per="image")
    framed = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, (top, left, *_), flip, shown in zip(
        framed, views.boxes.tolist(), views.flips.tolist(), crop.apply(images, views), strict=True
    ):
        expected = image[:, top + 4 : top + 16, left + 4 : left + 24]
        assert torch.equal(shown, expected.flip(2) if flip else expected)
    owner = [0, 3, 3, *[1] * 57]
    assert torch.equal(crop.apply(images, views, owner), crop.apply(images, views.rows(owner)))
    assert torch.equal(crop.apply(images, views.rows([5])), crop.apply(images, views.rows([5] * 60)))


def test_frames_are_used_evenly():
    views = PadCrop(pad=2, flip=0.2).sample(4000, SHAPE, seeded(2), per="image")
    for corner in views.boxes[:, :2].unbind(1):
        counts = [int((corner == value).sum()) for value in range(-2, 3)]
        assert sum(counts) == 4000
        assert stats.chisquare(counts).pvalue > 1e-3
    assert float(views.flips.double().mean()) == pytest.approx(0.2, abs=0.03)


# The curriculum of CDA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "share"), [(0, 1.0), (1000, 0.86527), (2000, 0.54), (3000, 0.21473), (3999, 0.08), (4000, 0.08)]
)
def test_the_least_share_falls_along_a_cosine(step, share):
    assert least_share(step, 4000) == pytest.approx(share, abs=5e-6)


def test_other_curricula():
    assert [least_share(step, 100, schedule="linear") for step in (0, 25, 50, 99)] == pytest.approx(
        [1.0, 0.77, 0.54, 0.0892]
    )
    assert [least_share(step, 100, schedule="step", milestone=0.5) for step in (0, 49, 50, 99)] == [1, 1, 0.08, 0.08]
    halved = [least_share(step, 100, milestone=0.5) for step in (0, 25, 49, 50, 80)]
    assert halved == pytest.approx([1, 0.54, 0.08 + 0.46 * (1 + math.cos(math.pi * 0.98)), 0.08, 0.08])
    assert least_share(0, 100, milestone=0.0) == 0.08
    assert least_share(50, 100, low=0.2) == pytest.approx(0.6)
    with pytest.raises(InvalidSetting, match="cosine"):
        least_share(1, 2, schedule="sudden")


# Settings ----------------------------------------------------------------------------------------------------


def test_mirroring_is_left_out_where_it_changes_the_class():
    for crop in (ResizedCrop(shift=2), PadCrop(pad=3)):
        assert crop.suited(True) == crop
        assert crop.suited(False) == replace(crop, flip=0.0)
        assert not bool(crop.suited(False).sample(200, SHAPE, seeded()).flips.any())


def test_bad_arguments_are_refused():
    crop, views = ResizedCrop(), ResizedCrop().sample(3, SHAPE, seeded())
    for other in (crop, PadCrop()):
        with pytest.raises(InvalidSetting, match="at least one group"):
            other.sample(0, SHAPE, seeded())
        with pytest.raises(InvalidSetting, match="'class' or 'image'"):
            other.sample(2, SHAPE, seeded(), per="batch")
    with pytest.raises(ShapeMismatch):
        crop.apply(pictures(4), views)
    with pytest.raises(ShapeMismatch):
        crop.apply(pictures(4), views, [0, 1, 2, 3])
    with pytest.raises(ShapeMismatch):
        crop.apply(pictures(3, shape=(3, 12, 12)), views)
    framed = CropViews.of_numbers(torch.tensor([[-2, 0, 12, 20, 0, 0, 0]]), SHAPE)
    with pytest.raises(InvalidSetting, match=r"ResizedCrop\.sample drew"):
        crop.apply(pictures(1), framed)
    with pytest.raises(InvalidSetting, match=r"ResizedCrop\.sample drew"):
        crop.apply(pictures(3), Siamese().sample(3, SHAPE, seeded()))
    with pytest.raises(InvalidSetting, match=r"PadCrop\.sample drew"):
        PadCrop().apply(pictures(3), views)
    assert PadCrop().apply(pictures(1), framed).shape == (1, *SHAPE)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ResizedCrop, {"scale": (0.0, 1.0)}),
        (ResizedCrop, {"scale": (0.5, 0.4)}),
        (ResizedCrop, {"scale": (0.5, 1.1)}),
        (ResizedCrop, {"scale": (0.5,)}),
        (ResizedCrop, {"ratio": (0.0, 1.0)}),
        (ResizedCrop, {"ratio": (1.0, float("inf"))}),
        (ResizedCrop, {"ratio": (1.0, float("nan"))}),
        (ResizedCrop, {"flip": 1.5}),
        (ResizedCrop, {"shift": -1}),
        (PadCrop, {"pad": -1}),
        (PadCrop, {"flip": -0.1}),
    ],
    ids=str,
)
def test_bad_settings_are_refused(kind, settings):
    with pytest.raises(InvalidSetting, match=rf"{kind.__name__}\.{next(iter(settings))}"):
        kind(**settings)


def test_settings_are_plain_on_disk_and_documented():
    for crop in (*CROPS, PadCrop(pad=2)):
        assert from_dict(Augmentation, json.loads(json.dumps(to_dict(crop)))) == crop
        assert all(field.doc for field in describe(type(crop)))
