"""Patches of RDED: resizing against the library, the choice by hand, the stitching cell by cell."""

import math

import pytest
import torch
from experts.schools import untrained
from torch import nn
from torch.nn.functional import interpolate

from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, Shared
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee, Teachers
from dsdistill.matching import patches
from dsdistill.matching.patches import cut, factor_of, middling_mosaics, mosaics, recognised_patches, resizing
from dsdistill.methods import RDED
from dsdistill.networks import NetworkSpec
from dsdistill.testing import toy_source

CPU = torch.device("cpu")


def run_of(source, seed=0):
    return Run(source.train_only(), CPU, Rng(seed), tuple(range(source.num_classes)), 7, shared=Shared())


@pytest.mark.parametrize("size", [3, 7, 16, 20])
def test_resizing_is_that_of_the_library_with_antialias(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 16, 16, generator=generator)
    for _ in range(20):
        length = int(torch.randint(1, 17, (), generator=generator))
        start = int(torch.randint(0, 17 - length, (), generator=generator))
        matrix = resizing(torch.tensor([start]), torch.tensor([length]), 16, size)[0]
        crop = image[None, :, start : start + length]
        expected = interpolate(crop, (size, 16), mode="bilinear", antialias=True, align_corners=False)[0]
        torch.testing.assert_close(matrix @ image, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(matrix.sum(1), torch.ones(size))


def test_crops_are_cut_out_of_their_images():
    source = toy_source(shape=(3, 8, 6))
    rows, boxes = torch.tensor([5, 20]), torch.tensor([[1, 2, 4, 4], [0, 0, 8, 6]])
    found = cut(run_of(source), rows, boxes, (4, 3))
    for patch, image, (top, left, height, width) in zip(found, source.gather(rows), boxes.tolist(), strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        expected = interpolate(crop, (4, 3), mode="bilinear", antialias=True, align_corners=False)[0]
        torch.testing.assert_close(patch, expected, rtol=1e-4, atol=1e-5)


def test_cells_of_a_mosaic_are_row_by_row():
    cells = [torch.full((1, 1, 2, 2), float(number)) for number in (1, 2, 3, 4)]
    assert mosaics(cells, (1, 4, 4))[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_first_cells_get_the_pixels_that_are_left_over():
    cells = [torch.full((1, 1, 2, 2), float(number)) for number in (1, 2, 3, 4)]
    assert mosaics(cells, (1, 5, 5))[0, 0].tolist() == [[1, 1, 1, 2, 2]] * 3 + [[3, 3, 3, 4, 4]] * 2


def test_cells_take_the_nearest_pixel():
    cells = [torch.arange(4.0).view(1, 1, 2, 2)]
    assert mosaics(cells, (1, 4, 4))[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


class Margin(nn.Module):
    """Says class 1 by how bright the middle of an image is: logits (0, a)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images):
        return torch.stack([torch.zeros(len(images)), images[:, 0, 3:5, 3:5].mean((1, 2))], 1)


@pytest.fixture
def source():
    """Ten images of each class; image n of class 1 is of brightness 20 n all over."""
    images = torch.cat([torch.zeros(10, 1, 8, 8), 20.0 * torch.arange(10).view(10, 1, 1, 1).expand(10, 1, 8, 8)])
    return ImageSource("levels", ["dark", "bright"], images.to(torch.uint8), torch.arange(2).repeat_interleave(10))


@pytest.fixture
def teacher(source):
    return untrained(source, NetworkSpec(width=4, depth=1, norm="batch"), network=Margin(), accuracy=0.9)


def test_patches_are_sorted_by_cross_entropy(source, teacher):
    found = recognised_patches(run_of(source), teacher, 1, factor=2, pool=10, crops=3)
    assert found.rows.tolist() == [19, 18, 17, 16, 15, 14, 13, 12, 11, 10]
    level = source.gather(found.rows)[:, 0, 0, 0]
    torch.testing.assert_close(found.losses, torch.log1p(torch.exp(-level)))
    assert all(height == width for _, _, height, width in found.boxes.tolist())


def test_of_each_image_the_best_crop_is_kept(teacher):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[1, :, 4:, 4:] = 255  # a crop of this corner alone is bright
    source = ImageSource("corner", ["dark", "bright"], images, torch.tensor([0, 1]))
    run = run_of(source)
    every = [recognised_patches(run, teacher, 1, 1, pool=1, crops=count).losses.item() for count in (1, 5, 50)]
    assert every[0] >= every[1] >= every[2]
    top, left, height, _ = recognised_patches(run, teacher, 1, 1, pool=1, crops=200).boxes[0].tolist()
    assert (top + height / 2, left + height / 2) > (4, 4)


def test_losses_by_hand(teacher):
    for margin, loss in {0: 0.6931, 1: 0.3133, 2: 0.1269, -1: 1.3133, 3: 0.0486}.items():
        assert math.log1p(math.exp(-margin)) == pytest.approx(loss, abs=5e-5)
    images = torch.tensor([0.0, 1, 2, -1, 3]).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    source = toy_source(classes=2, shape=(1, 8, 8))
    found = patches._losses(run_of(source), teacher, 1, images)
    torch.testing.assert_close(found, torch.tensor([0.6931, 0.3133, 0.1269, 1.3133, 0.0486]), atol=5e-5, rtol=0)


def test_a_small_patch_is_framed_in_mean_colour(teacher):
    source = toy_source(classes=2, shape=(1, 8, 8))
    framed = []
    teacher.network.register_forward_pre_hook(lambda _, arguments: framed.append(arguments[0]))
    patches._losses(run_of(source), teacher, 1, torch.ones(1, 1, 4, 4))
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1
    assert torch.equal(framed[0][0, 0], expected)


def test_ranks_go_to_cells_before_images(source, teacher, monkeypatch):
    monkeypatch.setattr(Committee, "of", lambda run, teachers: Committee([teacher]))
    method, run = RDED(ipc=2, factor=2, pool=10, crops=1), run_of(source)
    found = method._images(run, 1)
    level = source.gather(torch.arange(len(source)))[:, 0, 0, 0]
    corners = [(0, 0), (0, 7), (7, 0), (7, 7)]
    for image in range(2):  # cell k of image i is the patch of rank 2 k + i; rank r is image 19 - r
        expected = [level[19 - (2 * cell + image)] for cell in range(4)]
        for (row, column), value in zip(corners, expected, strict=True):
            assert found[image, 0, row, column] == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ipc": 3, "factor": 2}, BadData, "fewer than the 12 images"),
        ({"ipc": 2, "factor": 2, "pool": 7}, InvalidSetting, "at least 8"),
    ],
)
def test_too_few_images_are_refused_before_any_work(settings, error, message, source):
    with pytest.raises(error, match=message):
        RDED(**settings, teachers=Teachers(networks=(NetworkSpec(width=4, depth=1, norm="batch"),))).check(source)


def test_published_settings_of_rded(source):
    presets = {"small": (1, 300, 5), "large": (2, 300, 5), "large_one_crop": (2, 300, 1)}
    made = {name: RDED.preset(name) for name in RDED.presets}
    assert {name: (one.factor, one.pool, one.crops) for name, one in made.items()} == presets


def test_crops_of_patches_are_squares_of_8_to_100_percent(teacher):
    images = torch.zeros(2, 1, 50, 50, dtype=torch.uint8)
    blank = ImageSource("blank", ["dark", "bright"], images, torch.tensor([0, 1]))
    kept = torch.cat([recognised_patches(run_of(blank, seed), teacher, 1, 1, 1, 1).boxes for seed in range(200)])
    share = kept[:, 2] * kept[:, 3] / 2500
    assert 0.06 < float(share.min()) < 0.12
    assert float(share.max()) > 0.95
    assert torch.equal(kept[:, 2], kept[:, 3])


def test_mosaics_are_of_one_patch_below_128_pixels():
    assert [factor_of((3, size, size)) for size in (32, 64, 127, 128, 224)] == [1, 1, 1, 2, 2]


def test_middling_mosaics_take_the_middle_third_without_repeating(source, teacher):
    run = run_of(source)
    levels = []
    for index in range(6):
        image = middling_mosaics(run, teacher, [1], index)
        assert image.shape == (1, 1, 8, 8)
        levels.append(round(float(source.normalization.to_unit(image)[0, 0, 0, 0]) * 255))
    # Ten patches: the middle third are ranks 3 to 5, images 16 to 14 of brightness 120 to 80.
    assert sorted(levels[:3]) == sorted(levels[3:]) == [80, 100, 120]


def test_middling_mosaics_do_not_depend_on_what_was_asked_before(source, teacher):
    run = run_of(source)
    middling_mosaics(run, teacher, [0, 1], 0)
    later = middling_mosaics(run, teacher, [1], 1)
    assert torch.equal(later, middling_mosaics(run_of(source), teacher, [1], 1))
