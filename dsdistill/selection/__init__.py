"""Choosing real images by their features: rules on features, and the network that gives them."""

from dsdistill.selection.choice import RULES, Rule, Selector, choose, pick
from dsdistill.selection.features import Extractor, class_features, class_outputs, image_outputs
from dsdistill.selection.herding import herding_indices
from dsdistill.selection.k_center import First, k_center_indices
from dsdistill.selection.k_means import k_means_indices
from dsdistill.selection.method import Selection
from dsdistill.selection.representative import representative_indices

__all__ = [
    "RULES",
    "Extractor",
    "First",
    "Rule",
    "Selection",
    "Selector",
    "choose",
    "class_features",
    "class_outputs",
    "herding_indices",
    "image_outputs",
    "k_center_indices",
    "k_means_indices",
    "pick",
    "representative_indices",
]
