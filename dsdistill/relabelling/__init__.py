"""Relabelling: teachers say what every view of a set shows, and students are trained on that."""

from dsdistill.relabelling.calibration import FerKD
from dsdistill.relabelling.codecs import CODECS, Codec, EightBits, Float, TopK, get_codec
from dsdistill.relabelling.distances import Distances
from dsdistill.relabelling.labelset import LabelSet
from dsdistill.relabelling.making import LabelsEstimate, estimate_labels, relabel
from dsdistill.relabelling.plan import label_bytes
from dsdistill.relabelling.replay import Replay

__all__ = [
    "CODECS",
    "Codec",
    "Distances",
    "EightBits",
    "FerKD",
    "Float",
    "LabelSet",
    "LabelsEstimate",
    "Replay",
    "TopK",
    "estimate_labels",
    "get_codec",
    "label_bytes",
    "relabel",
]
