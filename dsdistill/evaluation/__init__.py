"""Scoring: train fresh networks on a set, test them once on the real test split, say how sure one can be."""

from dsdistill.evaluation.across import CrossEvaluation, evaluate_across
from dsdistill.evaluation.result import EvaluationResult
from dsdistill.evaluation.score import evaluate
from dsdistill.evaluation.statistics import Score, paired_difference
from dsdistill.protocols import PROTOCOLS, EvaluationProtocol, get_protocol, list_protocols

__all__ = [
    "PROTOCOLS",
    "CrossEvaluation",
    "EvaluationProtocol",
    "EvaluationResult",
    "Score",
    "evaluate",
    "evaluate_across",
    "get_protocol",
    "list_protocols",
    "paired_difference",
]
