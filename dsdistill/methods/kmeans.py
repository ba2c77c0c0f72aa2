"""k-means centres: of every class the real images nearest to the centres of its clusters.

The features of a class are clustered into as many clusters as it gets images, and each cluster is shown by the real
image nearest to its centre::

    min_{m_1 .. m_I}  Σ_{x ∈ T_c} min_j ‖ φ_θ(x) − m_j ‖²,      S_c = { argmin_{x ∈ T_c} ‖ φ_θ(x) − m_j ‖ : j = 1 .. I }

φ_θ(x) is the input of the classifier of a network trained on all real images. This is the row called "K-Center" in
DC-BENCH (Cui et al., arXiv 2207.09639) and in tables that took over its values; `KCenter` is another rule. The authors
released the chosen images, not what chose them: how θ is trained and how often the clustering starts are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from dsdistill.selection import Rule, Selection


@dataclass(frozen=True, kw_only=True)
class KMeans(Selection):
    """Real images nearest to the centres of k-means clusters of their class; nothing is learned but the features."""

    paper: ClassVar[str] = "Cui et al., DC-BENCH: Dataset Condensation Benchmark, NeurIPS 2022, arXiv 2207.09639"

    @property
    def rule(self) -> Rule:
        return "kmeans"
