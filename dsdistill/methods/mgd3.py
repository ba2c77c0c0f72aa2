"""MGD3 (Chan-Santiago et al., MGD3: Mode-Guided Dataset Distillation using Diffusion Models, arXiv 2505.18963).

The latents of the real images of a class are clustered into as many modes m_k as it gets images (k-means), and the
k-th image is drawn with a pull towards m_k for the first part of its way, so that the set has the modes of the class,
and the rest of the way makes each a likely image::

    DDPM:  x ← μ_t + λ σ_t (m_k − x̂0) + σ_t n,          for all but the last `until` steps
    DDIM:  ε̂ ← ε̂ − √(1 − ᾱ_t) λ (m_k − x̂0)

with x̂0 of the guided prediction. λ = 0.1 is the paper's, with 50 steps and the pull left out of the last 26.

A DDIM step so moves the latent by λ √(1 − ᾱ) (√(ᾱ' (1 − ᾱ) / ᾱ) − √(1 − ᾱ')) (m_k − x̂0), which is far beyond m_k
where the first noise level has nearly no signal, as in cosine schedules: there DDIM is refused.

Departures: the paper's equation 6 adds the term to ε̂, which would push away from the mode; its algorithm 1 and code
subtract it, as here. Clusters are of latents of images that are not mirrored. The largest cluster comes first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsdistill.engine import Preset
from dsdistill.generative.guided import Guided
from dsdistill.generative.sampling import DIT


@dataclass(frozen=True, kw_only=True)
class MGD3(Guided):
    """Mode guidance: each image is drawn towards a cluster of its class, and then left alone."""

    paper: ClassVar[str] = (
        "Chan-Santiago et al., MGD3: Mode-Guided Dataset Distillation using Diffusion Models, ICML 2025, "
        "arXiv 2505.18963"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "dit": Preset("authors' code, DiT-XL/2 at 256 pixels", {"sampler": DIT}),
    }
