"""Signals to match, as plain functions of tensors."""

from dsdistill.objectives.attention import spatial_attention
from dsdistill.objectives.characteristic import characteristic_distance, characters
from dsdistill.objectives.distribution import class_means, class_sums, mean_distance
from dsdistill.objectives.gradient import (
    GradientDistance,
    absolute_error,
    global_cosine,
    layerwise_cosine,
    squared_error,
)
from dsdistill.objectives.smoothness import total_variation

__all__ = [
    "GradientDistance",
    "absolute_error",
    "characteristic_distance",
    "characters",
    "class_means",
    "class_sums",
    "global_cosine",
    "layerwise_cosine",
    "mean_distance",
    "spatial_attention",
    "squared_error",
    "total_variation",
]
