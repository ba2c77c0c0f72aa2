"""CDA (Yin & Shen, Dataset Distillation via Curriculum Data Augmentation in Large Data Era, arXiv 2311.18838).

SRe2L whose crops begin as the whole image and become smaller: at iteration t of I, with the fraction M of it that the
curriculum takes, the smallest share of the image that a crop may have is::

    s(t) = 0.08 + 0.92 (1 + cos(π t / (M I))) / 2    for t < M I,    0.08 after      ("cosine")

or falls along a line ("linear"), or stays 1 until M I ("step"). The largest share stays 1, and all else is SRe2L's.

Departures: as in SRe2L.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le

from dsdistill.augmentations import least_share
from dsdistill.engine import Preset
from dsdistill.experts import RECIPES, Teachers
from dsdistill.matching.recovery import Recovery

_README = "README of the authors' code"
_TINY = Teachers(training=RECIPES["sre2l_tiny"])


@dataclass(frozen=True, kw_only=True)
class CDA(Recovery):
    """Curriculum data augmentation: recovery of SRe2L under crops that shrink from the whole image."""

    paper: ClassVar[str] = (
        "Yin & Shen, Dataset Distillation via Curriculum Data Augmentation in Large Data Era, TMLR 2024, "
        "arXiv 2311.18838"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "tiny_imagenet": Preset(_README, {"lr_images": 0.4, "statistics_weight": 0.05, "shift": 4, "teachers": _TINY}),
        "imagenet": Preset(_README, {"shift": 32}),
        "imagenet_21k": Preset(
            _README, {"lr_images": 0.05, "iterations": 2000, "statistics_weight": 0.25, "shift": 32}
        ),
    }

    curriculum: Literal["cosine", "linear", "step"] = "cosine"
    """How the smallest share of a crop falls from 1 to 0.08."""
    milestone: Annotated[float, Gt(0), Le(1)] = 1.0
    """M, the fraction of the iterations that it takes."""

    def least_share(self, iteration: int) -> float:
        return least_share(iteration, self.iterations, schedule=self.curriculum, milestone=self.milestone)
