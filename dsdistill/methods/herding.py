"""Herding (Welling, Herding Dynamical Weights to Learn, ICML 2009), as iCaRL chooses exemplars (arXiv 1611.07725).

The mean feature of the chosen images follows that of their class: the k-th choice, k = 1, 2, ..., is ::

    i_k = argmin_i ‖ (k μ_c − Σ_{j < k} φ_θ(x_{i_j})) − φ_θ(x_i) ‖,      i not chosen yet

φ_θ(x) is the input of the classifier of a network trained on all real images.

Departures: DeepCore takes the argmax in the place of the argmin, which chooses outliers, and returns what it chose in
storage order. iCaRL scales every feature to length 1; tables of distillation do not, and neither is it done here.
"""

from dataclasses import dataclass
from typing import ClassVar

from dsdistill.selection import Rule, Selection


@dataclass(frozen=True, kw_only=True)
class Herding(Selection):
    """Real images whose mean feature follows that of their class; nothing is learned but the features."""

    paper: ClassVar[str] = "Welling, Herding Dynamical Weights to Learn, ICML 2009; as in iCaRL, arXiv 1611.07725"

    @property
    def rule(self) -> Rule:
        return "herding"
