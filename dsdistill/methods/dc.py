"""Gradient matching (Zhao, Mopuri & Bilen, Dataset Condensation with Gradient Matching, arXiv 2006.05929).

Learns pixels S on which a network is pushed in the direction in which real images push it, all along a short training
on S itself::

    min_S  E_θ₀  Σ_t Σ_c D( ∇_θ ℓ(T_c; θ_t),  ∇_θ ℓ(S_c; θ_t) ),      θ_{t+1} = train(θ_t on S)
    D(A, B) = Σ_layers Σ_outputs ( 1 − ⟨A_i, B_i⟩ / (‖A_i‖ ‖B_i‖ + 1e-6) )

ℓ is the mean cross-entropy of one class's images, A_i the weights of one output; parameters of one dimension (biases,
scales and shifts of batch, instance and group norm) do not count, those of a layer norm over (C, H, W) do. The
algorithm is in `dsdistill.matching.condensation`, gradients and chunks in `dsdistill.matching.gradients`, D in
`dsdistill.objectives.gradient`.

Departures from the authors' code: networks are trained on S by SGD without momentum, as in the code since it has held
DSA; the code released with the paper and its figures has momentum 0.5 there, kept over all t
(``momentum_network=0.5``). Exactly ``iterations`` networks, where the code takes one more and saves what it has not
evaluated; every draw comes from the run's seed, not from the clock; gradients of parameters of one dimension, which D
leaves out, are not computed, so the two other distances, which the code takes over all tensors, leave them out as well;
a class smaller than the real batch (or than the 16 images of the statistics of batch normalisation) gives all it has;
CIFAR-100 is standardised by its own statistics, where the code took those of CIFAR-10 until 2022, published figures
included. Dropout, where a network has it, is off while gradients are matched. Soft labels and other forms than pixels
are additions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsdistill.engine import Metrics, Preset, Run, State
from dsdistill.matching import GradientCondensation

_PUBLISHED = {
    **dict.fromkeys(("mnist", "fashion_mnist", "svhn", "cifar10"), (1, 10, 50)),
    "cifar100": (1, 10),
}


@dataclass(frozen=True, kw_only=True)
class DC(GradientCondensation):
    """Gradient matching: synthetic classes push networks the way the real ones do."""

    paper: ClassVar[str] = (
        "Zhao, Mopuri & Bilen, Dataset Condensation with Gradient Matching, ICLR 2021, arXiv 2006.05929"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        f"{data}/ipc{ipc}": Preset("section 3 and appendix A of the paper, main.py", {"ipc": ipc})
        for data, budgets in _PUBLISHED.items()
        for ipc in budgets
    }

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        return self.condense(run, state, iteration)
