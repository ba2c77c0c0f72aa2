"""What methods that match statistics of real and synthetic images have in common."""

from dsdistill.matching.characteristic import match_characters
from dsdistill.matching.classes import class_positions, class_ranges
from dsdistill.matching.condensation import GradientCondensation, loops
from dsdistill.matching.gradients import (
    gradient_chunk,
    match_gradients,
    matched_weights,
    refuse_unsettled,
    settle_batchnorm,
)
from dsdistill.matching.means import match_means
from dsdistill.matching.pixels import refuse_whitened, unit_step
from dsdistill.matching.trajectory import TrajectoryMatching
from dsdistill.matching.views import ClassViews

__all__ = [
    "ClassViews",
    "GradientCondensation",
    "TrajectoryMatching",
    "class_positions",
    "class_ranges",
    "gradient_chunk",
    "loops",
    "match_characters",
    "match_gradients",
    "match_means",
    "matched_weights",
    "refuse_unsettled",
    "refuse_whitened",
    "settle_batchnorm",
    "unit_step",
]
