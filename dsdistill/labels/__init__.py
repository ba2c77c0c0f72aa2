"""Kinds of labels a synthetic set may carry."""

from dsdistill.labels.base import Labels
from dsdistill.labels.hard import HardLabels

KINDS: dict[str, type[Labels]] = {kind.key: kind for kind in (HardLabels,)}
"""Closed table: the only classes a saved set may ask for."""

__all__ = ["KINDS", "HardLabels", "Labels"]
