"""Characteristic functions against complex exponentials, one vector and one frequency at a time, in float64."""

import cmath
import math

import pytest
import torch

from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.objectives import characteristic_distance, characters
from dsdistill.objectives.characteristic import SCALE

WEIGHTS = [(0.5, 0.5), (0.3, 0.3), (0.7, 0.3), (0.001, 0.999), (0.5, 0.0), (0.0, 0.5)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed))


def function_of(vectors, frequency):
    """Φ(t), a Python complex number."""
    angles = [sum(a * b for a, b in zip(vector, frequency, strict=True)) for vector in vectors.tolist()]
    return sum(cmath.exp(1j * angle) for angle in angles) / len(angles)


def slow_distance(reals, synthetics, frequencies, alpha, beta):
    """The formula of the paper, with phases as angles, summed over classes."""
    total = 0.0
    for real, synthetic in zip(reals, synthetics, strict=True):
        values = []
        for frequency in frequencies.tolist():
            r, s = function_of(real, frequency), function_of(synthetic, frequency)
            turn = 1 - math.cos(cmath.phase(r) - cmath.phase(s))
            values.append(math.sqrt(alpha * (abs(r) - abs(s)) ** 2 + beta * 2 * abs(r) * abs(s) * turn))
        total += 300 * sum(values) / len(values)
    return total


def means(classes, frequencies):
    return torch.stack([characters(vectors, frequencies).mean(0) for vectors in classes])


def test_characters_are_cosines_then_sines():
    features, frequencies = unit(3, 5), normal(4, 5, seed=1)
    found = characters(features, frequencies)
    assert found.shape == (3, 8)
    for row, vector in zip(found.tolist(), features, strict=True):
        exact = [function_of(vector[None], frequency) for frequency in frequencies.tolist()]
        assert row == pytest.approx([value.real for value in exact] + [value.imag for value in exact], abs=1e-14)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_distance_is_that_of_the_formula(weights):
    reals, synthetics = (unit(7, 5), unit(4, 5, seed=1)), (unit(3, 5, seed=2), unit(6, 5, seed=3))
    frequencies = normal(16, 5, seed=4)
    found = characteristic_distance(means(reals, frequencies), means(synthetics, frequencies), *weights)
    assert float(found) == pytest.approx(slow_distance(reals, synthetics, frequencies, *weights), rel=1e-9)
    assert float(found) > 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradients_are_those_of_finite_differences(weights):
    frequencies = normal(6, 4, seed=1)
    real = means((unit(5, 4), unit(6, 4, seed=2)), frequencies)

    def loss(vectors, frequencies):
        synthetic = torch.stack([characters(one, frequencies).mean(0) for one in vectors.split(3)])
        return characteristic_distance(real, synthetic, *weights)

    vectors = unit(6, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(loss, (vectors, frequencies.clone().requires_grad_()))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_equal_features_are_at_no_distance_and_pull_nowhere(weights):
    vectors = unit(6, 5).requires_grad_()
    found = means([vectors], normal(16, 5, seed=1))
    loss = characteristic_distance(found.detach(), found, *weights)
    floor = SCALE * math.sqrt(weights[1] * 1e-12) if weights[0] != weights[1] else 0.0
    assert float(loss.detach()) <= floor + 1e-15
    assert float(loss.detach()) <= 300 * 1e-6
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert float(gradient.abs().max()) < 1e-9  # and no NaN


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_amplitudes_of_nothing_have_a_gradient(weights):
    """Where Φ vanishes its phase has no meaning; neither loss nor gradient may be NaN."""
    zero, some = torch.zeros(1, 6, dtype=torch.float64), normal(1, 6)
    for real, synthetic in ((zero, zero), (some, zero), (zero, some)):
        leaf = synthetic.clone().requires_grad_()
        loss = characteristic_distance(real, leaf, *weights)
        loss.backward()
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(leaf.grad).all())


def test_equal_weights_are_the_length_of_the_difference():
    reals, synthetics = means([unit(9, 5)], t := normal(32, 5, seed=2)), means([unit(4, 5, seed=1)], t)
    exact = (torch.complex(*reals.chunk(2, 1)) - torch.complex(*synthetics.chunk(2, 1))).abs().mean() / math.sqrt(2)
    near = characteristic_distance(reals, synthetics, 0.5, 0.5 + 1e-9)  # the general form, amplitude and phase
    assert float(characteristic_distance(reals, synthetics)) == pytest.approx(300 * float(exact), rel=1e-12)
    assert float(near) == pytest.approx(300 * float(exact), rel=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_order_and_number_of_copies_do_not_matter(weights):
    real, synthetic, frequencies = unit(8, 5), unit(6, 5, seed=1), normal(16, 5, seed=2)
    base = characteristic_distance(means([real], frequencies), means([synthetic], frequencies), *weights)
    others = [synthetic[[3, 1, 0, 5, 4, 2]], synthetic.repeat(3, 1), synthetic.repeat_interleave(2, 0)]
    for other in others:
        again = characteristic_distance(means([real], frequencies), means([other], frequencies), *weights)
        torch.testing.assert_close(again, base, rtol=1e-12, atol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeMismatch, match=r"features \(M, D\)"):
        characters(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ShapeMismatch, match="as the real"):
        characteristic_distance(torch.zeros(1, 4), torch.zeros(1, 6))
    with pytest.raises(ShapeMismatch, match=r"\(K, 2n\)"):
        characteristic_distance(torch.zeros(1, 3), torch.zeros(1, 3))
    for weights in ((0.0, 0.0), (-0.1, 0.5)):
        with pytest.raises(InvalidSetting, match="at least 0"):
            characteristic_distance(torch.zeros(1, 4), torch.zeros(1, 4), *weights)
