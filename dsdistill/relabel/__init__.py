"""Relabelling: teachers say what every view of a set shows, and students are trained on that."""

from dsdistill.relabel.calibration import FerKD
from dsdistill.relabel.codecs import CODECS, Codec, EightBits, Float, TopK, get_codec
from dsdistill.relabel.distances import Distances
from dsdistill.relabel.labelset import LabelSet
from dsdistill.relabel.making import LabelsEstimate, estimate_labels, relabel
from dsdistill.relabel.replay import Replay

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
    "relabel",
]
