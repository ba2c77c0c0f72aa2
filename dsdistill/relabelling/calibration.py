"""FerKD: which views of an image a teacher labels, which get its class, and which are left out.

Shen, FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023. With the confidence c of a view and
thresholds low < middle < top: c < low or c > top leaves the view out (it shows nothing, or nothing new); low <= c <
middle replaces the teacher's word by the softened class, 1 - eps for it and eps / (K - 1) for each other; else the
teacher is believed. The paper's thresholds, and whether c is the probability of the true class or the largest, were
not at hand: both are settings, and the defaults are ours. Its SelfMix is not here.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting


@dataclass(frozen=True, kw_only=True)
class FerKD:
    """Thresholds of the confidence, at temperature 1.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range, or the thresholds do not ascend.
    """

    low: Annotated[float, Ge(0), Le(1)] = 0.05
    """Views below it are left out."""
    middle: Annotated[float, Ge(0), Le(1)] = 0.3
    """Views below it get their class, softened."""
    top: Annotated[float, Ge(0), Le(1)] = 0.99
    """Views above it are left out."""
    eps: Annotated[float, Gt(0), Lt(1)] = 0.1
    """What the softened class gives to the others together."""
    confidence: Literal["true", "max"] = "true"
    """Probability of the image's own class, or the largest."""

    def __post_init__(self) -> None:
        validate(self)
        if not self.low < self.middle < self.top:
            raise InvalidSetting("FerKD.middle", self.middle, f"between low, {self.low}, and top, {self.top}")

    def calibrated(self, logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as they are stored, and which views are kept.

        Args:
            logits: (B, K), the teacher's.
            classes: (B,) int64, the class of each image.

        Returns:
            (B, K), with log probabilities of the softened class where that replaces the teacher's word; and (B,) bool,
            False where the view is left out.
        """
        probabilities = logits.softmax(1)
        own = probabilities.gather(1, classes[:, None])[:, 0]
        sure = own if self.confidence == "true" else probabilities.amax(1)
        others = max(1, logits.shape[1] - 1)
        softened = torch.full_like(logits, math.log(self.eps / others))
        softened.scatter_(1, classes[:, None], math.log(1 - self.eps))
        kept = (sure >= self.low) & (sure <= self.top)
        return torch.where((kept & (sure < self.middle))[:, None], softened, logits), kept
