"""Distribution matching (Zhao & Bilen, Dataset Condensation with Distribution Matching, arXiv 2110.04181).

Learns pixels S such that, under freshly initialised networks φ_θ and shared random views A_ω, the mean feature
of each synthetic class equals that of the real class::

    min_S  E_{θ, ω}  Σ_c ‖ mean_{x ∈ T_c} φ_θ(A_{ω_c}(x)) − mean_{s ∈ S_c} φ_θ(A_{ω_c}(s)) ‖²

φ_θ(x) is the flattened output of the last block; the sum runs over its coordinates and over classes, without
normalisation. Each step draws one θ, ``real_batch`` images of every class and one view per class, applied alike to
its real and synthetic images.

Departures from the authors' code: all classes pass the network together, in chunks (equal up to summation order,
because instance, group and layer normalisation do not couple images; a network with batch normalisation gets each
side whole, as one domain of statistics). Every random draw comes from the run's seed, not from the clock. Exactly
``iterations`` updates are made, and the last one is what is saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt

from dsdistill.augmentations import Augmentation, Siamese
from dsdistill.engine import Job, Metrics, PerClass, Preset, Run, State
from dsdistill.matching import ClassViews, match_means
from dsdistill.networks import Need, NetworkSpec, embed, has_batchnorm
from dsdistill.objectives import mean_distance

_UNTOLD = ("fashion_mnist", "svhn")  # settings of the code, for which no figures were published
_PUBLISHED = {
    **dict.fromkeys(("mnist", "fashion_mnist", "svhn", "cifar100", "tiny_imagenet"), (1, 10, 50)),
    "cifar10": (1, 10, 50, 100, 200, 500, 1000, 1250),
}


@dataclass(frozen=True, kw_only=True)
class DM(PerClass):
    """Distribution matching: synthetic class means follow real class means under random networks."""

    paper: ClassVar[str] = "Zhao & Bilen, Dataset Condensation with Distribution Matching, WACV 2023, arXiv 2110.04181"
    network_needs: ClassVar[tuple[Need, ...]] = ("features",)
    presets: ClassVar[Mapping[str, Preset]] = {
        f"{data}/ipc{ipc}": Preset(
            "main_DM.py" if data in _UNTOLD else "section 4.1 of the paper, main_DM.py",
            {"ipc": ipc, "lr_images": 10.0 if ipc >= 100 else 1.0},
        )
        for data, budgets in _PUBLISHED.items()
        for ipc in budgets
    }

    iterations: Annotated[int, Ge(1)] = 20_000
    """Outer steps."""
    real_batch: Annotated[int, Ge(1)] = 256
    """Real images per class and step, without replacement; a smaller class gives all it has."""
    lr_images: Annotated[float, Gt(0)] = 1.0
    """SGD step size on standardised pixels."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of that SGD."""
    network: NetworkSpec = NetworkSpec()
    """Network whose random initialisations embed the images."""
    augmentation: Augmentation | None = Siamese()
    """Views shared by the real and synthetic images of a class; flips are left out where they change the class."""

    @property
    def steps(self) -> int:
        return self.iterations

    def start(self, run: Run, job: Job) -> State:
        images, labels = self.random_real(run)
        optimizer = torch.optim.SGD(images.parameters(), lr=self.lr_images, momentum=self.momentum)
        return State(images, labels, {"images": optimizer})

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        network = run.network(self.network, iteration)
        optimizer = state.optimizers["images"]
        optimizer.zero_grad()
        loss = match_means(
            run,
            state,
            iteration,
            signal=partial(embed, network),
            distance=mean_distance,
            real_batch=self.real_batch,
            views=ClassViews.drawn(self.augmentation, run, iteration),
            couples=has_batchnorm(network),
        )
        optimizer.step()
        state.images.constrain()
        return {"loss": loss}
