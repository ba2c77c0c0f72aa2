"""Gradient distances: the numbers of the formula, and a loop over rows."""

import math

import pytest
import torch

from dsdistill.errors import ShapeMismatch
from dsdistill.networks import ConvNet
from dsdistill.objectives import absolute_error, global_cosine, layerwise_cosine, squared_error

EVERY = [layerwise_cosine, global_cosine, squared_error, absolute_error]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_sides(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)]


def slow_layerwise(real, synthetic):
    """Row by row, number by number."""
    total = 0.0
    for a, b in zip(real, synthetic, strict=True):
        if a.dim() == 1:
            continue
        for row, other in zip(a, b, strict=True):
            pairs = list(zip(row.flatten().tolist(), other.flatten().tolist(), strict=True))
            lengths = [math.sqrt(sum(pair[side] ** 2 for pair in pairs)) for side in (0, 1)]
            total += 1 - sum(x * y for x, y in pairs) / (lengths[0] * lengths[1] + 1e-6)
    return total


def test_layerwise_cosine_goes_row_by_row_and_leaves_vectors_out():
    real = [tensor([[1, 0], [0, 1]]), tensor([3, 4])]
    synthetic = [tensor([[1, 0], [1, 0]]), tensor([-3, 4])]
    assert float(layerwise_cosine(real, synthetic)) == pytest.approx(1.0000010, abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "expected"), [([2, 0], [-5, 0], 2), ([2, 0], [7, 0], 1e-6 / 14), ([0, 0], [3, 1], 1)]
)
def test_opposite_parallel_and_vanishing_rows(a, b, expected):
    for pair in ((a, b), (b, a)):
        value = float(layerwise_cosine(*([tensor([row])] for row in pair)))
        assert value == pytest.approx(expected, abs=1e-6 if expected == 2 else 1e-12)


@pytest.mark.parametrize(("length", "expected"), [(1e-3, 0.5), (1e-4, 0.990099)])
def test_the_floor_is_absolute(length, expected):
    short = [tensor([[length, 0]])]
    assert float(layerwise_cosine(short, short)) == pytest.approx(expected, abs=1e-6)


def test_a_kernel_is_one_row():
    real, synthetic = [tensor([[[[1, 2], [3, 4]]]])], [tensor([[[[4, 3], [2, 1]]]])]
    assert float(layerwise_cosine(real, synthetic)) == pytest.approx(1 - 20 / 30, abs=1e-6)


def test_opposite_gradients_of_the_published_network():
    generator = torch.Generator().manual_seed(0)
    network = ConvNet((3, 32, 32), 10)
    gradients = [torch.randn(weight.shape, generator=generator).double() for weight in network.parameters()]
    assert float(layerwise_cosine(gradients, [-g for g in gradients])) == pytest.approx(2 * (3 * 128 + 10), abs=1e-3)


def test_all_agree_with_slow_loops():
    real, synthetic = random_sides((4, 3, 2, 2), (4,), (5, 2, 3), (3, 7), (1, 1))
    pairs = [
        pair
        for a, b in zip(real, synthetic, strict=True)
        for pair in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    ]
    lengths = [math.sqrt(sum(pair[side] ** 2 for pair in pairs)) for side in (0, 1)]
    expected = {
        layerwise_cosine: slow_layerwise(real, synthetic),
        global_cosine: 1 - sum(x * y for x, y in pairs) / (lengths[0] * lengths[1] + 1e-6),
        squared_error: sum((x - y) ** 2 for x, y in pairs),
        absolute_error: sum(abs(x - y) for x, y in pairs),
    }
    for distance, value in expected.items():
        assert float(distance(real, synthetic)) == pytest.approx(value, rel=1e-12), distance.__name__


@pytest.mark.parametrize("distance", EVERY, ids=lambda distance: distance.__name__)
def test_slopes_are_those_of_finite_differences(distance):
    real, synthetic = random_sides((2, 3), (2, 1, 2, 2))
    leaves = [side.requires_grad_() for side in synthetic]
    assert torch.autograd.gradcheck(lambda *sides: distance(real, sides), leaves)


def test_a_vanishing_row_has_a_finite_slope():
    leaf = torch.zeros(2, 3, requires_grad=True)
    layerwise_cosine([torch.ones(2, 3)], [leaf]).backward()
    assert bool(torch.isfinite(leaf.grad).all())


@pytest.mark.parametrize("distance", EVERY, ids=lambda distance: distance.__name__)
def test_what_does_not_fit_is_refused(distance):
    for real, synthetic in (([], []), ([torch.ones(2, 2)], []), ([torch.ones(2, 2)], [torch.ones(2, 3)])):
        with pytest.raises(ShapeMismatch, match="synthetic gradient"):
            distance(real, synthetic)
    with pytest.raises(ShapeMismatch, match="two dimensions"):
        layerwise_cosine([torch.ones(3)], [torch.ones(3)])
