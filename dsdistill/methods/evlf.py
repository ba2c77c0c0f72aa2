"""EVLF (Early Vision-Language Fusion for Generative Dataset Distillation, CVPR 2026, arXiv 2603.07476).

Text commonly enters late, by attention inside the denoiser, and corrects too much. Here the name of a class enters
early: a small attention module F fuses it into the latent μ of an image before any denoiser sees it::

    μ' = F(μ, e_y),     min_{F, P}  λ₁ L_NCE(P(μ'), e_y) + λ₂ ‖μ' − μ‖²

with e_y the text states of the class, P a projector of latents that training alone uses, and the multi-positive
contrastive loss in both directions (all images of a class are positives). λ₂ rises over the first half of training, so
latents first learn to say their class, and then to stay what they were. `dsdistill.generative.fusion` has the module.

The fused latents take the place of plain ones in whatever draws the images: here in mode guidance (`MGD3`, the authors'
released script), whose modes are clusters of them. `D4M`, `Minimax` and `Diffusion` take the same setting ``fusion``:
prototypes then are of fused latents, and fine-tuning learns these (for `Diffusion` nothing changes: it uses none).

Text: CLIP's encoder where one is named (``fusion.text``, extra "text"), as in the paper; else an encoder of letters
that is trained with the fusion. That one knows no language: it tells names apart, and gives each class directions of
its own.

With the residual the fusion changes latents little: the projector learns most of the alignment itself, and λ₂ draws μ'
back to μ. On digits the fused latents differ from plain ones by 3 % of their deviation, so images are nearly those of
`MGD3`. ``fusion.residual`` false changes them as the authors' module does, which also loses what it cannot rebuild.

Departures: prompts are one name of a class, theirs all synonyms ("tench, Tinca tinca"). The module begins as the
identity, and adds to μ what it finds; the authors' replaces μ (``fusion.residual`` false). The end-of-text state is the
first, theirs the last, which is padding. Modes are clusters of latents of images that are not mirrored, where theirs
mirror at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsdistill.engine import Preset
from dsdistill.generative.fusion import Fusion
from dsdistill.generative.guided import Guided
from dsdistill.generative.sampling import DIT


@dataclass(frozen=True, kw_only=True)
class EVLF(Guided):
    """Early fusion: latents learn the names of their classes before any image is drawn of them."""

    paper: ClassVar[str] = (
        "EVLF: Early Vision-Language Fusion for Generative Dataset Distillation, CVPR 2026, arXiv 2603.07476"
    )

    presets: ClassVar[Mapping[str, Preset]] = {
        "dit": Preset(
            "authors' code, DiT-XL/2 at 256 pixels, ten classes; fusion.text: CLIP of Stable Diffusion 1.5",
            {
                "sampler": DIT,
                "fusion": Fusion(residual=False, steps=1600),
            },
        ),
    }

    fusion: Fusion | None = Fusion()
    """How latents are fused with the names of their classes."""
