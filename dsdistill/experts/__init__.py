"""Networks trained on the real images of a run."""

from dsdistill.experts.training import train_on_real

__all__ = ["train_on_real"]
