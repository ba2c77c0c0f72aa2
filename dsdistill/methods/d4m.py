"""D4M (Su et al., D4M: Dataset Distillation via Disentangled Diffusion Model, arXiv 2407.15138), its first two stages.

The latents of the real images of a class are clustered into as many prototypes z_k as it gets images. Each gets noise
as of a share τ of the way, and is drawn from there::

    x_t = √ᾱ_t z_k + √(1 − ᾱ_t) ε at the step τ S of S,     then denoised by class with guidance, and decoded

so an image keeps what its prototype looks like from afar. τ = 0.7, S = 50 and a guidance of 8 are the paper's, with
Stable Diffusion 1.5 at 512 pixels and the names of classes as prompts.

Labels: networks learn what a teacher says of crops ("training-time matching"), as protocol "sre2l" has it; under other
protocols hard labels.

Departures: the code denoises with the scheduler that comes with Stable Diffusion and the negative prompt "cartoon,
anime, painting" (here DDIM, and ``models.weights.negative``); its prompts are all synonyms of a class. It clusters with
mini-batches of exactly as many latents as there are clusters, and fits left-over ones for the last class alone; here
k-means sees all latents. Latents are means, theirs are samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le
from torch import Tensor

from dsdistill.engine import Preset, Run
from dsdistill.generative.method import Drawing
from dsdistill.generative.sampling import Sampler, Start


@dataclass(frozen=True, kw_only=True)
class D4M(Drawing):
    """Prototypes of a class as starting points: clusters of latents, blurred by noise and drawn anew."""

    paper: ClassVar[str] = (
        "Su et al., D4M: Dataset Distillation via Disentangled Diffusion Model, CVPR 2024, arXiv 2407.15138"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "stable_diffusion": Preset(
            "authors' code, Stable Diffusion 1.5 at 512 pixels", {"sampler": Sampler(steps=50, guidance=8.0)}
        ),
    }

    strength: Annotated[float, Gt(0), Le(1)] = 0.7
    """τ, the share of the way that is drawn."""

    def needed(self) -> int:
        return self.ipc

    def begin(self, run: Run, classes: Tensor, places: Tensor) -> Start:
        return Start(self.of_modes(run, classes, places), self.strength)
