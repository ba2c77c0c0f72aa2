"""Gradient matching under shared random views (Zhao & Bilen, Dataset Condensation with Differentiable Siamese
Augmentation, arXiv 2102.08259).

Gradient matching (DC) whose real and synthetic images of a class are shown through one random view, drawn anew for each
class and each step, so that the images learn to be augmented::

    min_S  E_{θ₀, ω}  Σ_t Σ_c D( ∇_θ ℓ(A_ωc(T_c); θ_t),  ∇_θ ℓ(A_ωc(S_c); θ_t) ),      θ_{t+1} = train(θ_t on A(S))

Networks are trained on S under views drawn for each image. D and everything else is as for DC, but images start as real
ones. The algorithm is in `dsdistill.matching.condensation`.

Departures from the authors' code: those of DC, except that the code, too, trains networks without momentum; and a view
is a record that is drawn once and applied to both sides, where the code seeds the global generator alike for both. The
loops of CIFAR-100 at 50 images per class are those of other data: the authors' readme gives no figure there, the one
that is quoted (42.8) comes from later tables.

FYI's code always mirrors every second time before it draws one of the other operations; the preset "cifar100/ipc50/fyi"
does, too. It scales and rotates on a grid aligned to the corners' centres, which is not followed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from dsdistill.augmentations import Augmentation, Siamese, flip_first
from dsdistill.engine import Metrics, Preset, Run, State
from dsdistill.matching import GradientCondensation


@dataclass(frozen=True, kw_only=True)
class DSA(GradientCondensation):
    """Gradient matching under views that real and synthetic images of a class share."""

    paper: ClassVar[str] = (
        "Zhao & Bilen, Dataset Condensation with Differentiable Siamese Augmentation, ICML 2021, arXiv 2102.08259"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"{data}/ipc{ipc}": Preset("section 4 and appendix of the paper, main.py", {"ipc": ipc})
            for data in ("mnist", "fashion_mnist", "svhn", "cifar10", "cifar100")
            for ipc in (1, 10, 50)
        },
        "cifar10/ipc100": Preset(
            "the authors in the issues of their code", {"ipc": 100, "outer_loop": 100, "inner_epochs": 2}
        ),
        "cifar100/ipc50/fyi": Preset(
            "the code of FYI (Son et al., arXiv 2407.08113)",
            {"ipc": 50, "outer_loop": 10, "inner_epochs": 10, "augmentation": flip_first()},
        ),
    }

    init: Literal["noise", "real"] = "real"
    """What the images start as: N(0, 1) in standardised units, or random real images."""
    augmentation: Augmentation | None = Siamese()
    """Views that both sides of a class share, and those of each image that networks train on; without unsafe flips."""

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        return self.condense(run, state, iteration)
