"""Signals to match, as plain functions of tensors."""

from dsdistill.objectives.distribution import class_means, class_sums, mean_distance

__all__ = ["class_means", "class_sums", "mean_distance"]
