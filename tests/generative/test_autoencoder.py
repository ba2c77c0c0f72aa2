"""Autoencoders in closed form, and the frames around images."""

import pytest
import torch

from dsdistill.core.rng import Rng
from dsdistill.data import Normalization
from dsdistill.errors import BadData, ShapeMismatch
from dsdistill.generative.autoencoder import KL, PatchPCA, halvings, small_kl
from dsdistill.generative.frames import Frame


def squares(count=40, channels=3, side=16, seed=0):
    """Smooth images, as real ones are: few components hold most of them."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, channels, 4, 4, generator=generator) * 2 - 1
    large = torch.nn.functional.interpolate(small, (side, side), mode="bilinear")
    return (large + 0.05 * torch.randn(large.shape, generator=generator)).clamp(-1, 1)


def test_all_components_rebuild_the_image():
    images = squares()
    made = PatchPCA.fitted(images, patch=4, most=48)
    assert made.latent == (48, 4, 4)
    assert float((made.decode(made.encode(images)) - images).abs().max()) < 1e-5


def test_latents_have_unit_deviation_and_come_back():
    images = squares()
    made = PatchPCA.fitted(images, patch=4, most=16)
    latents = made.encode(images)
    deviations = latents.permute(1, 0, 2, 3).flatten(1).std(1, correction=0)
    torch.testing.assert_close(deviations, torch.ones(16), rtol=1e-4, atol=1e-4)
    assert float((made.encode(made.decode(latents)) - latents).abs().max()) < 1e-4


def test_it_is_the_projection_that_loses_least():
    """Against the singular vectors of all patches, cut out in a loop."""
    images = squares(count=12, channels=2, side=6)
    cut = [images[n, :, y : y + 3, x : x + 3].flatten() for n in range(12) for y in (0, 3) for x in (0, 3)]
    rows = torch.stack(cut).double()
    _, _, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    best = rows.mean(0) + (rows - rows.mean(0)) @ directions[:5].T @ directions[:5]
    made = PatchPCA.fitted(images, patch=3, most=5)
    back = made.decode(made.encode(images))
    again = [back[n, :, y : y + 3, x : x + 3].flatten() for n in range(12) for y in (0, 3) for x in (0, 3)]
    torch.testing.assert_close(torch.stack(again).double(), best, rtol=1e-4, atol=1e-4)


def test_components_that_do_not_vary_are_left_out():
    flat = squares(channels=1)
    flat[:, :, :, 1::2] = flat[:, :, :, ::2]  # pairs of columns are alike
    assert PatchPCA.fitted(flat, patch=2).latent[0] == 2
    with pytest.raises(BadData, match="all of one colour"):
        PatchPCA.fitted(torch.ones(3, 1, 4, 4), patch=2)
    with pytest.raises(ShapeMismatch, match="squares"):
        PatchPCA.fitted(flat, patch=2).encode(squares())


@pytest.mark.parametrize(("side", "grid"), [(16, 8), (32, 16), (64, 16), (28, 14)])
def test_a_small_kl_autoencoder_has_the_grid_that_is_promised(side, grid):
    made = small_kl(1, side, halvings(side), Rng(0))
    images = squares(2, 1, side)
    assert made.latent == (4, grid, grid)
    assert made.encode(images).shape == (2, 4, grid, grid)
    assert made.decode(made.encode(images)).shape == images.shape
    again = small_kl(1, side, halvings(side), Rng(0))
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), again.parameters(), strict=True))


def test_the_scale_of_a_kl_autoencoder_travels_with_its_weights():
    made = small_kl(1, 16, 1, Rng(0))
    made.stored_scale.fill_(0.25)
    other = KL(small_kl(1, 16, 1, Rng(1)).model, 16)
    other.load_state_dict(made.state_dict())
    assert other.scale == 0.25


NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.mark.parametrize("channels", [3, 1])
def test_padding_is_cut_off_again(channels):
    normalization = NORMALIZATION if channels == 3 else Normalization((0.4,), (0.2,))
    frame = Frame((channels, 10, 6), normalization, 12, channels)
    images = normalization.standardize(torch.rand(2, channels, 10, 6, generator=torch.Generator().manual_seed(0)))
    made = frame.squares(images)
    assert made.shape == (2, channels, 12, 12)
    assert torch.equal(made[:, :, 9:, 6:], made[:, :, 9:10, 5:6].expand(-1, -1, 3, 6))
    torch.testing.assert_close(made[:, :, :10, :6], 2 * normalization.to_unit(images) - 1)
    torch.testing.assert_close(frame.restored(made), images, rtol=1e-5, atol=1e-5)


def test_restored_pixels_are_within_their_range():
    frame = Frame((3, 8, 8), NORMALIZATION, 8, 3)
    unit = NORMALIZATION.to_unit(
        frame.restored(5 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    )
    assert float(unit.min()) > -1e-6
    assert float(unit.max()) < 1 + 1e-6


def test_resized_grey_images_for_a_model_of_colours():
    frame = Frame((1, 8, 8), Normalization((0.5,), (0.5,)), 32, 3, resize=True)
    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    made = frame.squares(images)
    assert made.shape == (1, 3, 32, 32)
    assert torch.equal(made[:, 0], made[:, 2])
    torch.testing.assert_close(frame.restored(made), images, rtol=0, atol=0.1)
