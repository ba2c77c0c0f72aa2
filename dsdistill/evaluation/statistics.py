"""Accuracies of repeated runs as mean, sample standard deviation and t-interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.errors import InvalidSetting


@dataclass(frozen=True)
class Score:
    """Repeated measurements and what they say about their mean.

    ``values`` are fractions in [0, 1] for accuracies, and differences of such for paired differences.

    Example:
        >>> score = Score((0.50, 0.52, 0.54))
        >>> round(score.mean, 3), round(score.std, 3), round(score.half_width, 4)
        (0.52, 0.02, 0.0497)
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(map(math.isfinite, self.values)):
            raise InvalidSetting("Score.values", self.values, "at least one number, all finite")

    @property
    def n(self) -> int:
        """Number of measurements."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return math.fsum(self.values) / self.n

    @property
    def std(self) -> float:
        """Sample standard deviation (divisor n - 1); NaN for a single measurement."""
        if self.n == 1:
            return math.nan
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (self.n - 1))

    @property
    def half_width(self) -> float:
        """Half width of the 95 % t-interval of the mean; NaN for a single measurement."""
        if self.n == 1:
            return math.nan
        from scipy.stats import t

        return float(t.ppf(0.975, self.n - 1)) * self.std / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % t-interval of the mean."""
        return self.mean - self.half_width, self.mean + self.half_width

    def to_json(self) -> dict[str, Any]:
        """Plain containers; what one measurement cannot tell is null."""
        spread = {"std": self.std, "ci95": self.half_width}
        return {
            "mean": self.mean,
            **{name: None if math.isnan(value) else value for name, value in spread.items()},
            "n": self.n,
            "values": list(self.values),
        }

    def __str__(self) -> str:
        spread = "" if self.n == 1 else f" ± {100 * self.half_width:.2f}"
        return f"{100 * self.mean:.2f}{spread} % (n={self.n})"


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Score:
    """Differences ``first - second`` of measurements made under the same seeds, in the same order.

    Raises:
        InvalidSetting: the lengths differ.
    """
    if len(first) != len(second):
        raise InvalidSetting("paired_difference", (len(first), len(second)), "two sequences of equal length")
    return Score(tuple(a - b for a, b in zip(first, second, strict=True)))
