"""Class-conditional sampling of a latent diffusion model: the row "DiT" or "LDM" of the tables of generative
distillation (Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748).

Nothing is distilled: for each class y, latents are drawn from p(z | y) and decoded::

    z ~ p_θ(z | y) by classifier-free guidance,     x = D(z / s)

It is the baseline that methods with modes, memories or fused text are to beat. Without pretrained weights autoencoder D
and denoiser θ are trained on the real images; what the set then owes to other data is nothing. `dsdistill.generative`
has both, and the samplers.

As every image has a stream of noise of its own, the first images of a larger set are those of a smaller one.
"""

from dataclasses import dataclass
from typing import ClassVar

from dsdistill.data import ImageSource
from dsdistill.errors import InvalidSetting
from dsdistill.generative.method import Drawing


@dataclass(frozen=True, kw_only=True)
class Diffusion(Drawing):
    """Images drawn from a diffusion model by their class: the baseline of generative methods."""

    paper: ClassVar[str] = "Peebles & Xie, Scalable Diffusion Models with Transformers, ICCV 2023, arXiv 2212.09748"

    def check(self, source: ImageSource) -> None:
        """Refuse what `Drawing.check` refuses, and a fusion, of which nothing would be made.

        Raises:
            BadArtifact, BadData, InvalidSetting, MissingWeights: naming the place and the mend.
        """
        if self.fusion is not None:
            told = "left out: nothing is made of real latents; EVLF, D4M and Minimax take one"
            raise InvalidSetting("Diffusion.fusion", type(self.fusion).__name__, told)
        super().check(source)
