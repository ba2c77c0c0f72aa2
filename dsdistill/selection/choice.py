"""Choosing images of every class of a run by a rule on their features."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from dsdistill.engine import Run
from dsdistill.errors import BadData, ShapeMismatch, UnknownName
from dsdistill.selection.features import Extractor, class_features
from dsdistill.selection.herding import herding_indices
from dsdistill.selection.k_center import k_center_indices
from dsdistill.selection.k_means import k_means_indices
from dsdistill.selection.representative import representative_indices

Selector = Callable[[Tensor, int, torch.Generator], Tensor]
"""Features (n, D), how many, a generator on the CPU -> rows (count,), best first, all different."""
Rule = Literal["kmeans", "kcenter", "herding", "representative"]
RULES: Mapping[Rule, Selector] = {
    "kmeans": k_means_indices,
    "kcenter": k_center_indices,
    "herding": herding_indices,
    "representative": representative_indices,
}


def choose(run: Run, rule: Rule | Selector, extractor: Extractor, count: int) -> list[Tensor]:
    """`pick` by the features that ``extractor`` gives.

    Args:
        extractor: the network whose features are looked at.

    Raises:
        UnknownName, BadData: as `pick`.
        Stopped: the run was asked to stop while the network was trained.
    """
    return pick(run, rule, class_features(run, extractor), count)


def pick(run: Run, rule: Rule | Selector, features: Iterable[Tensor], count: int) -> list[Tensor]:
    """Storage indices of ``count`` images of each class of the run, best first, for `PerClass.made_of`.

    A class with fewer images gives all it has. What is chosen of a class depends on neither the job nor the other
    classes that it has.

    Args:
        rule: its name, or a function of features (see `Selector`).
        features: (n_c, D) of each class of the run in turn, a row for each image in storage order, as
            `class_outputs` gives them; asked for one at a time.
        count: images of each class.

    Raises:
        UnknownName: no rule of that name.
        BadData: features are not finite.
        ShapeMismatch: not a row for each image of the class.
    """
    if isinstance(rule, str) and rule not in RULES:
        raise UnknownName("rule", rule, get_args(Rule))
    select = RULES[rule] if isinstance(rule, str) else rule
    rng = run.rng.scoped("").within("choose")
    chosen = []
    for index, found in zip(run.classes, features, strict=True):
        name, size = run.source.classes[index], run.source.counts[index]
        if len(found) != size:
            raise ShapeMismatch(f"the features of class {name!r}", tuple(found.shape), f"({size}, D), a row per image")
        try:
            rows = select(found, min(count, size), rng.at("rule", index, device="cpu"))
        except BadData as error:
            raise BadData(f"class {name!r}: {error}") from error
        chosen.append(rows + run.source.offsets[index])
    return chosen
