"""Choosing images of every class of a run by a rule on their features."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from dsdistill.engine import Run
from dsdistill.errors import BadData, UnknownName
from dsdistill.selection.features import Extractor, class_features
from dsdistill.selection.herding import herding_indices
from dsdistill.selection.k_center import k_center_indices
from dsdistill.selection.k_means import k_means_indices

Selector = Callable[[Tensor, int, torch.Generator], Tensor]
"""Features (n, D), how many, a generator on the CPU -> rows (count,), best first, all different."""
Rule = Literal["kmeans", "kcenter", "herding"]
RULES: Mapping[Rule, Selector] = {
    "kmeans": k_means_indices,
    "kcenter": k_center_indices,
    "herding": herding_indices,
}


def choose(run: Run, rule: Rule | Selector, extractor: Extractor, count: int) -> list[Tensor]:
    """Storage indices of ``count`` images of each class of the run, best first, for `PerClass.made_of`.

    A class with fewer images gives all it has. What is chosen of a class depends on neither the job nor the other
    classes that it has.

    Args:
        rule: its name, or a function of features (see `Selector`).
        extractor: the network whose features are looked at.
        count: images of each class.

    Raises:
        UnknownName: no rule of that name.
        BadData: features are not finite.
        Stopped: the run was asked to stop while the network was trained.
    """
    if isinstance(rule, str) and rule not in RULES:
        raise UnknownName("rule", rule, get_args(Rule))
    select = RULES[rule] if isinstance(rule, str) else rule
    rng = run.rng.scoped("").within("choose")
    chosen = []
    for index, features in zip(run.classes, class_features(run, extractor), strict=True):
        try:
            rows = select(features, min(count, len(features)), rng.at("rule", index, device="cpu"))
        except BadData as error:
            raise BadData(f"class {run.source.classes[index]!r}: {error}") from error
        chosen.append(rows + run.source.offsets[index])
    return chosen
