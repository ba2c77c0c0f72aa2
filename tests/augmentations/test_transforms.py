import math

import pytest
import torch
from torch.nn import functional as F

from dsdistill.augmentations import transforms


def pictures(count=3, shape=(3, 8, 6), dtype=torch.float64):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def per_image(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


ZERO, ONE = per_image(0, 0, 0), per_image(1, 1, 1)
NEUTRAL = {
    "color": lambda x: transforms.color(x, ZERO, ONE, ONE),
    "crop": lambda x: transforms.crop(x, ZERO, ZERO),
    "cutout": lambda x: transforms.cutout(x, ZERO, ZERO, (0, 0)),
    "flip": lambda x: transforms.flip(x, ZERO),
}
WARPS = {
    "scale": lambda x: transforms.scale(x, ONE.to(x), ONE.to(x)),
    "rotate": lambda x: transforms.rotate(x, ZERO.to(x)),
}
ACTIVE = {
    "color": lambda x: transforms.color(x, per_image(0.3, -0.5, 0.1), per_image(0, 2, 0.4), per_image(1.5, 0.5, 0.8)),
    "crop": lambda x: transforms.crop(x, per_image(1, -1, 0), per_image(0, 2, -1)),
    "cutout": lambda x: transforms.cutout(x, per_image(0, 3, 5), per_image(4, 2, 0), (3, 2)),
    "flip": lambda x: transforms.flip(x, per_image(0, 1, 0)),
    "scale": lambda x: transforms.scale(x, per_image(0.85, 1.2, 1), per_image(1.1, 0.9, 1.15)),
    "rotate": lambda x: transforms.rotate(x, per_image(0.2, -0.1, 0.26)),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_parameters_are_the_identity(name):
    images = pictures()
    assert torch.equal(NEUTRAL[name](images), images)


@pytest.mark.parametrize("name", WARPS)
def test_neutral_warps_are_the_identity(name):
    square = pictures(shape=(3, 32, 32), dtype=torch.float32)
    assert torch.equal(WARPS[name](square), square)
    for shape in ((3, 28, 28), (1, 9, 15)):
        images = pictures(shape=shape)
        torch.testing.assert_close(WARPS[name](images), images, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVE)
def test_derivatives_of_both_orders_equal_finite_differences(name):
    images = pictures(shape=(2, 4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(ACTIVE[name], images)
    assert torch.autograd.gradgradcheck(lambda x: ACTIVE[name](x).pow(3), images)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_change_the_images_and_keep_the_shape(name):
    images = pictures()
    kept = images.clone()
    shown = ACTIVE[name](images)
    assert shown.shape == images.shape
    assert shown.dtype == images.dtype
    assert not torch.equal(shown, images)
    assert torch.equal(images, kept)


def test_color_equals_its_formula():
    images = pictures()
    shown = transforms.color(images, per_image(0.3, -0.5, 0.1), per_image(0, 2, 0.4), per_image(1.5, 0.5, 0.8))
    for image, result, b, s, c in zip(images, shown, (0.3, -0.5, 0.1), (0, 2, 0.4), (1.5, 0.5, 0.8), strict=True):
        bright = image + b
        mean = bright.mean(0)
        saturated = (bright - mean) * s + mean
        expected = (saturated - saturated.mean()) * c + saturated.mean()
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_saturation_of_one_channel_is_the_identity():
    images = pictures(shape=(1, 8, 6))
    assert torch.equal(transforms.color(images, ZERO, per_image(0, 2, 0.3), ONE), images)


@pytest.mark.parametrize(("down", "right"), [(2, -1), (-8, 0), (1, 3), (9, 0)])
def test_crop_moves_whole_pixels_and_fills_with_zero(down, right):
    images = pictures(1)
    padded = F.pad(images, (9, 9, 9, 9))
    expected = padded[:, :, 9 + down : 17 + down, 9 + right : 15 + right]
    assert torch.equal(transforms.crop(images, per_image(down), per_image(right)), expected)


@pytest.mark.parametrize(
    ("row", "column", "pixels"), [(0, 0, 64), (16, 16, 256), (32, 32, 64), (0, 16, 128), (32, 0, 64)]
)
def test_cutout_zeroes_the_published_number_of_pixels(row, column, pixels):
    images = torch.ones(1, 3, 32, 32)
    shown = transforms.cutout(images, per_image(row), per_image(column), (16, 16))
    assert (shown[0] == 0).sum((1, 2)).tolist() == [pixels] * 3
    assert ((shown == 0) | (shown == 1)).all()


def test_cutout_of_odd_size_is_centred_and_hides_even_infinite_pixels():
    images = torch.full((1, 1, 5, 7), torch.inf)
    shown = transforms.cutout(images, per_image(2), per_image(3), (3, 1))
    assert (shown[0, 0] == 0).nonzero().tolist() == [[1, 3], [2, 3], [3, 3]]


def test_flip_mirrors_the_width():
    images = pictures()
    shown = transforms.flip(images, per_image(0, 1, 0))
    assert torch.equal(shown[1], images[1].flip(2))
    assert torch.equal(shown[::2], images[::2])


def test_warps_equal_the_library_grids_on_square_images():
    images = pictures(shape=(2, 7, 7))
    sx, sy, angle = per_image(0.85, 1.2, 1), per_image(1.1, 0.9, 1.15), per_image(0.2, -0.1, 0.26)
    zero, cos, sin = torch.zeros_like(sx), angle.cos(), angle.sin()

    def library(theta):
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    scaling = torch.stack([torch.stack([sx, zero, zero], 1), torch.stack([zero, sy, zero], 1)], 1)
    rotation = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    torch.testing.assert_close(transforms.scale(images, sx, sy), library(scaling), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transforms.rotate(images, angle), library(rotation), rtol=1e-12, atol=1e-12)


def test_scale_above_one_shrinks():
    images = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    shown = transforms.scale(images, per_image(2), per_image(1))[0, 0]
    assert torch.equal(shown[0], per_image(0, 0, 1, 1, 1, 1, 0, 0))


def test_a_quarter_turn_permutes_pixels_and_a_half_turn_does_so_on_oblong_images():
    square, oblong = pictures(1, (2, 5, 5)), pictures(1, (2, 4, 7))
    quarter = transforms.rotate(square, per_image(math.pi / 2))
    torch.testing.assert_close(quarter, square.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    half = transforms.rotate(oblong, per_image(math.pi))
    torch.testing.assert_close(half, oblong.flip(2, 3), rtol=0, atol=1e-12)


def test_rotation_of_oblong_images_does_not_shear():
    images = torch.zeros(1, 1, 9, 21, dtype=torch.float64)
    images[0, 0, 4, 7:14] = 1
    turned = transforms.rotate(images, per_image(math.pi / 2))
    expected = torch.zeros_like(images)
    expected[0, 0, 1:8, 10] = 1
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)
