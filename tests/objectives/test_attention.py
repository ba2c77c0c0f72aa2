import pytest
import torch

from dsdistill.errors import ShapeMismatch
from dsdistill.objectives import spatial_attention

MAPS = torch.tensor([[[[1.0, -2.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, -3.0]]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1, torch.tensor([3, 2, 0, 6]) / 7),
        (2, torch.tensor([5, 4, 0, 18]) / 365**0.5),
        (4, torch.tensor([17, 16, 0, 162]) / (17**2 + 16**2 + 162**2) ** 0.5),
    ],
)
def test_attention_of_two_channels(power, expected):
    torch.testing.assert_close(spatial_attention(MAPS, power)[0], expected.double(), rtol=1e-7, atol=0)


def test_the_published_figures_of_the_example():
    torch.testing.assert_close(
        spatial_attention(MAPS, 4)[0].float(), torch.tensor([0.10387, 0.09776, 0, 0.98978]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("power", [1, 2, 2.5, 4])
def test_equals_the_formula_written_as_loops(power):
    maps = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for image, row in zip(maps, spatial_attention(maps, power), strict=True):
        plain = [sum(abs(float(image[c, y, x])) ** power for c in range(4)) for y in range(2) for x in range(5)]
        length = sum(value**2 for value in plain) ** 0.5
        torch.testing.assert_close(row, torch.tensor(plain, dtype=torch.float64) / length)


@pytest.mark.parametrize("normalize", ["l2", "l1", "none"])
def test_length_and_scale(normalize):
    attention, larger = spatial_attention(MAPS, 2, normalize), spatial_attention(3 * MAPS, 2, normalize)
    if normalize == "none":
        torch.testing.assert_close(larger, 9 * attention)
    else:
        torch.testing.assert_close(larger, attention)
        assert float(attention.norm(p=int(normalize[1]), dim=1)) == pytest.approx(1)


def test_a_map_of_zeros_has_no_attention_and_a_finite_gradient():
    maps = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention = spatial_attention(maps, 1)
    assert not attention.any()
    attention.sum().backward()
    assert bool(torch.isfinite(maps.grad).all())


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_the_gradient_is_that_of_finite_differences(power):
    maps = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: spatial_attention(x, power), maps.requires_grad_())


def test_half_precision_is_summed_in_single():
    maps = 100 * torch.ones(1, 8, 2, 2, dtype=torch.float16)  # 100^4 is no float16
    torch.testing.assert_close(spatial_attention(maps, 4), torch.full((1, 4), 0.5))


def test_maps_of_another_shape_are_refused():
    with pytest.raises(ShapeMismatch, match="feature maps"):
        spatial_attention(torch.zeros(2, 3))
