"""What methods that match statistics of real and synthetic images have in common."""

from dsdistill.matching.classes import class_positions, class_ranges
from dsdistill.matching.means import match_means
from dsdistill.matching.pixels import refuse_whitened, unit_step
from dsdistill.matching.views import ClassViews

__all__ = ["ClassViews", "class_positions", "class_ranges", "match_means", "refuse_whitened", "unit_step"]
