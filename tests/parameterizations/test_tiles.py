import pytest
import torch
from torch.nn import functional as F

from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch
from dsdistill.parameterizations import FORMS, Pixels, Tiled, Tiles
from dsdistill.parameterizations.tiles import cut_tiles, paste_tiles


def images(count=5, shape=(3, 32, 32), seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiles(count=5, factor=2, shape=(3, 32, 32)):
    return Tiles(images(count, shape), torch.full((count,), factor))


def slow_decode(stored, factor):
    """Tile by tile, then image by image, with the library's interpolation."""
    height, width = stored.shape[2:]
    down, right = -(-height // factor), -(-width // factor)
    padded = F.pad(stored, (0, right * factor - width, 0, down * factor - height))
    return torch.cat(
        [
            F.interpolate(
                image[None, :, r * down : (r + 1) * down, c * right : (c + 1) * right],
                (height, width),
                mode="bilinear",
                align_corners=False,
            )
            for r in range(factor)
            for c in range(factor)
            for image in padded
        ]
    )


@pytest.mark.parametrize(
    ("factor", "shape"), [(1, (3, 8, 8)), (2, (3, 32, 32)), (3, (1, 28, 28)), (2, (3, 7, 10)), (4, (2, 9, 5))]
)
def test_decoding_is_cutting_and_enlarging(factor, shape):
    form = tiles(3, factor, shape)
    decoded = form.decode()
    torch.testing.assert_close(decoded.images, slow_decode(form.pixels, factor), rtol=1e-5, atol=1e-5)
    assert decoded.images.shape == (3 * factor**2, *shape)
    assert decoded.owner.tolist() == [0, 1, 2] * factor**2
    assert form.multiplicity.tolist() == [factor**2] * 3


def test_a_constant_image_stays_constant_and_four_tiles_weigh_as_much_as_their_image():
    form = Tiles(torch.full((5, 3, 32, 32), 0.7), torch.full((5,), 2))
    made = form.decode().images
    assert made.shape == (20, 3, 32, 32)
    torch.testing.assert_close(made, torch.full_like(made, 0.7), rtol=0, atol=1e-6)
    made.sum().backward()
    assert form.pixels.grad.mean().item() == pytest.approx(4, abs=1e-5)


def test_the_padding_is_the_mean_colour():
    form = Tiles(torch.ones(1, 1, 3, 3), torch.tensor([2]))  # padded to 4 x 4
    assert form.decode().images.detach().amin((1, 2, 3)).tolist() == [1, 0, 0, 0]


def test_factors_may_differ_between_images():
    form = Tiles(images(4), torch.tensor([1, 3, 2, 3]))
    decoded = form.decode()
    assert decoded.owner.tolist() == [1, 3] * 9 + [2] * 4 + [0]
    assert form.multiplicity.tolist() == [1, 9, 4, 9]
    assert torch.equal(decoded.images[-1], form.pixels[0])
    torch.testing.assert_close(decoded.images[18:22], slow_decode(form.pixels[2:3], 2), rtol=1e-5, atol=1e-5)
    some = form.decode(torch.tensor([2, 0]))
    assert some.owner.tolist() == [2] * 4 + [0]
    assert torch.equal(some.images[:4], decoded.images[18:22])
    assert len(form.decode(torch.tensor([], dtype=torch.int64)).images) == 0


def test_gradients_of_decoding():
    stored = images(1, (1, 5, 4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cut_tiles(x, 2), stored)
    assert torch.autograd.gradgradcheck(lambda x: cut_tiles(x, 2).square(), stored)


@pytest.mark.parametrize(("factor", "shape"), [(2, (3, 32, 32)), (3, (1, 28, 28)), (2, (3, 7, 10))])
def test_a_mixed_start_shows_each_real_image_where_it_is_decoded(factor, shape):
    constant = torch.arange(4.0 * factor**2)[:, None, None, None].expand(-1, *shape)
    form = tiles(4, factor, shape)
    form.imitate(constant)
    # Tile k of image j resembles real image k * 4 + j; where sides were padded, away from the padding.
    middle = form.decode().images[..., shape[1] // 2 - 1, shape[2] // 2 - 1]
    torch.testing.assert_close(middle, constant[..., 0, 0], rtol=0, atol=1e-4)


def test_pasting_reduces_with_antialiasing():
    checkers = torch.ones(4, 1, 8, 8)
    checkers[..., ::2, :] = -1  # the nearest pixel would be 1 or -1 throughout
    assert float(paste_tiles(checkers, 2)[..., 1:-1, :].abs().max()) < 0.3


def test_imitating_with_different_factors():
    form = Tiles(torch.zeros(3, 1, 6, 6), torch.tensor([1, 2, 1]))
    wanted = torch.arange(6.0)[:, None, None, None].expand(-1, 1, 6, 6)
    form.imitate(wanted)
    torch.testing.assert_close(form.decode().images, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ShapeMismatch, match=r"imitate.*\(6, 1, 6, 6\)"):
        form.imitate(wanted[:3])


def test_what_is_stored_is_what_is_counted_and_restored():
    form = Tiles(images(4), torch.tensor([1, 3, 2, 3]))
    assert form.nbytes == 4 * 3 * 32 * 32 * 4 + 4  # a byte for each factor
    assert FORMS["tiles"] is Tiles
    again = Tiles.restore(form.tensors(), form.settings())
    assert torch.equal(again.decode().images, form.decode().images)
    assert [name for name, _ in form.named_parameters()] == ["pixels"]


def test_subsets_and_joins_keep_each_factor():
    form = Tiles(images(4), torch.tensor([1, 3, 2, 3]))
    part = form.subset(torch.tensor([2, 0]))
    assert part.factors.tolist() == [2, 1]
    assert torch.equal(part.pixels, form.pixels[[2, 0]])
    joined = Tiles.join([part, form])
    assert joined.factors.tolist() == [2, 1, 1, 3, 2, 3]
    part.pixels.data.zero_()
    assert torch.equal(joined.pixels[0], form.pixels[2])


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"pixels": images(2)}, BadData, "factors"),
        ({"pixels": images(2), "factors": torch.tensor([1])}, ShapeMismatch, r"\(2,\)"),
        ({"pixels": images(2), "factors": torch.tensor([0, 1])}, BadData, r"\[0, 1\]"),
        ({"pixels": images(2), "factors": torch.tensor([1, 33])}, BadData, "1 to 32"),
        ({"pixels": images(2), "factors": torch.tensor([1.0, 2.0])}, ShapeMismatch, "integers"),
        ({"pixels": images(2)[0], "factors": torch.tensor([1, 2])}, ShapeMismatch, "N, C, H, W"),
    ],
    ids=["none", "too few", "zero", "too many tiles", "float", "one image"],
)
def test_content_of_another_make_is_refused(tensors, error, message):
    with pytest.raises(error, match=message):
        Tiles.restore(tensors, {})


@pytest.mark.parametrize(
    ("factor", "bound", "ipc", "expected"),
    [
        (2, None, 3, [2, 2, 2]),
        (2, 3, 3, [1, 1, 1]),
        (3, 1000, 4, [3, 3, 3, 3]),
        # By hand: (100 - 20) // 9 = 8 of factor 3; (100 - 72 - 12) // 4 = 4 of factor 2; 8 of factor 1: 96 images.
        (3, 100, 20, [3] * 8 + [2] * 4 + [1] * 8),
        (1, 50, 5, [1] * 5),
    ],
)
def test_a_bound_gives_the_first_images_the_full_factor(factor, bound, ipc, expected):
    form = Tiled(factor=factor, bound=bound)
    assert form.factors(ipc) == expected
    assert form.images_per_class(ipc) == sum(f**2 for f in expected) <= (bound or 10**9)
    built = form.build([ipc, ipc], (3, 8, 8))
    assert built.factors.tolist() == expected * 2
    assert float(built.pixels.detach().abs().max()) == 0


def test_forms_that_do_not_fit_are_refused():
    with pytest.raises(InvalidSetting, match=r"Tiled.bound = 3 is not valid: at least the 4 stored"):
        Tiled(bound=3).images_per_class(4)
    with pytest.raises(InvalidSetting, match=r"Tiled.factor = 9.*8 pixels"):
        Tiled(factor=9).build([1], (3, 8, 10))
    with pytest.raises(InvalidSetting, match=r"Tiled\.factor"):
        Tiled(factor=0)


def test_noise_fills_what_is_stored():
    form = Tiled().build([40], (3, 16, 16))
    form.fill_noise(torch.Generator().manual_seed(0))
    assert abs(float(form.pixels.detach().mean())) < 0.02
    assert float(form.pixels.detach().std()) == pytest.approx(1, abs=0.02)
    plain = Pixels(torch.zeros(40, 3, 16, 16))
    plain.fill_noise(torch.Generator().manual_seed(0))
    assert torch.equal(plain.pixels, form.pixels)
