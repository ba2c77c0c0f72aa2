"""Kinds of labels a synthetic set may carry."""

from dsdistill.labels.base import Labels
from dsdistill.labels.hard import HardLabels
from dsdistill.labels.soft import SoftLabels

KINDS: dict[str, type[Labels]] = {kind.key: kind for kind in (HardLabels, SoftLabels)}
"""Closed table: the only classes a saved set may ask for."""

__all__ = ["KINDS", "HardLabels", "Labels", "SoftLabels"]
