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

from dsdistill.data import ImageSource
from dsdistill.engine import Job, PerClass, Run, State
from dsdistill.selection import Extractor, First, choose, k_center_indices


@dataclass(frozen=True, kw_only=True)
class KCenter(PerClass):
    """Real images that cover their class: always the one farthest from those chosen; no learning but of features."""

    paper: ClassVar[str] = (
        "Sener & Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, ICLR 2018, "
        "arXiv 1708.00489"
    )

    extractor: Extractor = Extractor()
    """Network whose features are covered, and how it is trained."""
    first: First = "mean"
    """Image of each class to begin with: the one nearest to the mean of its features, or one at random."""

    def check(self, source: ImageSource) -> None:
        super().check(source)
        self.extractor.check(source)

    def start(self, run: Run, job: Job) -> State:
        count = self.form.images_per_class(self.ipc)
        rule = partial(k_center_indices, first=self.first)
        return State(*self.made_of(run, choose(run, rule, self.extractor, count)))
