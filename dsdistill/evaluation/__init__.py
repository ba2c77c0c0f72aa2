"""Scoring: train fresh networks on a set, test them once on the real test split, say how sure one can be."""

from dsdistill.evaluation.protocol import PROTOCOLS, EvaluationProtocol, get_protocol, list_protocols
from dsdistill.evaluation.score import EvaluationResult, evaluate
from dsdistill.evaluation.statistics import Score, paired_difference

__all__ = [
    "PROTOCOLS",
    "EvaluationProtocol",
    "EvaluationResult",
    "Score",
    "evaluate",
    "get_protocol",
    "list_protocols",
    "paired_difference",
]
