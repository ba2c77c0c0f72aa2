"""k-center greedy (Sener & Savarese, Active Learning for CNNs: A Core-Set Approach, arXiv 1708.00489).

Covers each class: beginning with the image nearest to the mean, always the image farthest from its nearest chosen one::

    i_{k+1} = argmax_i min_{j <= k} ‖ φ_θ(x_i) − φ_θ(x_{i_j}) ‖,      i_1 = argmin_i ‖ φ_θ(x_i) − μ_c ‖

φ_θ(x) is the input of the classifier of a network trained on all real images. It goes for outliers, which is why it is
weak at small budgets. Tables call two rules "K-Center": this one, and in DC-BENCH and its followers the images nearest
to k-means centres, which is `KMeans` here and much stronger.

Departures from the code of DeepCore: a running minimum in the place of a matrix of all distances; the network is
trained on the real images themselves, not on ImageNet; the chosen stay in order of choice.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from dsdistill.selection import First, Selection, Selector, k_center_indices


@dataclass(frozen=True, kw_only=True)
class KCenter(Selection):
    """Real images that cover their class: always the one farthest from those chosen; no learning but of features."""

    paper: ClassVar[str] = (
        "Sener & Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, ICLR 2018, "
        "arXiv 1708.00489"
    )

    first: First = "mean"
    """Image of each class to begin with: the one nearest to the mean of its features, or one at random."""

    @property
    def rule(self) -> Selector:
        return partial(k_center_indices, first=self.first)
