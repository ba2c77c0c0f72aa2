"""Networks trained on the real images of a run."""

from dsdistill.experts.pool import Pool
from dsdistill.experts.training import train_on_real

__all__ = ["Pool", "train_on_real"]
