import json
import math

import numpy as np
import pytest
from scipy import stats

from dsdistill.errors import InvalidSetting
from dsdistill.evaluation import Score, paired_difference

ACCURACIES = [(0.5, 0.52, 0.54), (0.1, 0.9), (0.31, 0.33, 0.29, 0.35, 0.30, 0.30), (0.2, 0.2, 0.2)]


@pytest.mark.parametrize("values", ACCURACIES, ids=str)
def test_mean_deviation_and_interval_are_those_of_scipy(values):
    score = Score(values)
    assert score.n == len(values)
    assert score.mean == pytest.approx(np.mean(values), abs=1e-15)
    assert score.std == pytest.approx(np.std(values, ddof=1), abs=1e-15)
    if score.std > 1e-15:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert score.interval == pytest.approx((low, high), abs=1e-13)
        assert score.half_width == pytest.approx((high - low) / 2, abs=1e-13)
    else:
        assert score.interval == pytest.approx((0.2, 0.2), abs=1e-13)


def test_known_values():
    score = Score((0.50, 0.52, 0.54))  # t(0.975; 2) = 4.30265..., deviation 0.02
    assert score.half_width == pytest.approx(4.302652729911275 * 0.02 / math.sqrt(3), rel=1e-9)
    assert str(score) == "52.00 ± 4.97 % (n=3)"


def test_one_measurement_has_no_spread():
    score = Score((0.25,))
    assert score.mean == 0.25
    assert all(math.isnan(value) for value in (score.std, score.half_width, *score.interval))
    assert score.to_json() == {"mean": 0.25, "std": None, "ci95": None, "n": 1, "values": [0.25]}
    assert str(score) == "25.00 % (n=1)"
    json.dumps(score.to_json(), allow_nan=False)


def test_json_has_everything_in_fractions():
    content = json.loads(json.dumps(Score((0.5, 0.75)).to_json(), allow_nan=False))
    assert content["values"] == [0.5, 0.75]
    assert (content["mean"], content["n"]) == (0.625, 2)
    assert content["std"] == pytest.approx(math.sqrt(2) / 8)
    assert content["ci95"] == pytest.approx(12.706204736 * math.sqrt(2) / 8 / math.sqrt(2))


@pytest.mark.parametrize("values", [(), (math.nan,), (0.5, math.inf), (0.5, math.nan)])
def test_no_numbers_and_no_finite_numbers_are_refused(values):
    with pytest.raises(InvalidSetting, match=r"Score\.values = .*finite"):
        Score(values)


def test_a_paired_difference_is_that_of_a_paired_t_test():
    first, second = (0.51, 0.48, 0.55, 0.50), (0.40, 0.44, 0.41, 0.43)
    gain = paired_difference(first, second)
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert gain.interval == pytest.approx((low, high), abs=1e-13)
    assert gain.mean == pytest.approx(0.09)
    assert gain.values == pytest.approx((0.11, 0.04, 0.14, 0.07))
    assert paired_difference(second, first).mean == pytest.approx(-0.09)
    assert gain.std == pytest.approx(np.std(np.subtract(first, second), ddof=1))


def test_pairs_must_match():
    with pytest.raises(InvalidSetting, match=r"\(2, 1\).*equal length"):
        paired_difference((0.5, 0.6), (0.5,))
    with pytest.raises(InvalidSetting, match="finite"):
        paired_difference((math.nan,), (0.5,))
