"""Autoencoders: images as latents and back.

`PatchPCA` is closed-form: patches of p x p pixels, of all channels together, are projected onto the k directions of
largest variance, each divided by its deviation::

    z = Σ^(-1/2) Uᵀ (patch − mean),     patch ≈ mean + U Σ^(1/2) z,     U (p² C, k) orthonormal

so latents have unit variance, and of all linear maps to k numbers it loses the least. `KL` is a small variational
autoencoder of diffusers (Kingma & Welling, arXiv 1312.6114; Rombach et al., arXiv 2112.10752), trained on the images or
loaded.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.errors import BadData, ShapeMismatch

MOST_COMPONENTS = 16
_LEAST_DEVIATION = 1e-4  # of the largest: what varies less is nothing but rounding


class Autoencoder(nn.Module):
    """Squares (B, C, S, S) in [-1, 1] as latents (B, c, g, g), whose deviation is about 1 / ``scale``.

    Attributes:
        channels: C.
        latent: (c, g, g).
        scale: denoisers see latents times this.
    """

    channels: int
    latent: tuple[int, int, int]
    scale: float

    @abstractmethod
    def encode(self, squares: Tensor) -> Tensor:
        """Means of the latents, unscaled."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Squares of unscaled latents, not cut off."""


class PatchPCA(Autoencoder):
    """Patches of pixels by their principal components; see the module's formula.

    Args:
        channels: C.
        side: S, a multiple of ``patch``.
        patch: p.
        components: k, at most p² C.
    """

    mean: Tensor
    basis: Tensor
    deviations: Tensor

    def __init__(self, channels: int, side: int, patch: int, components: int) -> None:
        super().__init__()
        numbers = channels * patch**2
        self.channels, self.patch, self.scale = channels, patch, 1.0
        self.latent = (components, side // patch, side // patch)
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("basis", torch.eye(numbers)[:, :components].contiguous())
        self.register_buffer("deviations", torch.ones(components))

    @classmethod
    def fitted(cls, squares: Tensor, patch: int, most: int = MOST_COMPONENTS) -> "PatchPCA":
        """On squares (N, C, S, S); with at most so many components, fewer where fewer vary.

        Raises:
            BadData: the images are all of one colour.
        """
        _, channels, side, _ = squares.shape
        patches = _patches(squares, patch).flatten(0, 2).double()
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
        count = int((variances > _LEAST_DEVIATION**2 * variances[0]).sum()) if variances[0] > 1e-12 else 0
        if count == 0:
            raise BadData("the images are all of one colour: nothing can be drawn like them")
        made = cls(channels, side, patch, min(most, count))
        kept = made.latent[0]
        directions = directions[:, :kept]
        # A sign for each direction, so that libraries that differ in it make the same latents.
        signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        made.mean.copy_(mean)
        made.basis.copy_(directions * signs)
        made.deviations.copy_(variances[:kept].sqrt())
        return made

    def encode(self, squares: Tensor) -> Tensor:
        if squares.shape[1] != self.channels:
            raise ShapeMismatch("squares", tuple(squares.shape), f"(B, {self.channels}, S, S)")
        found = (_patches(squares, self.patch) - self.mean) @ self.basis / self.deviations
        return found.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        patches = latents.permute(0, 2, 3, 1) * self.deviations @ self.basis.T + self.mean
        count, down, across, _ = patches.shape
        pixels = patches.view(count, down, across, self.channels, self.patch, self.patch)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(count, self.channels, down * self.patch, across * self.patch)


class KL(Autoencoder):
    """An `AutoencoderKL` of diffusers.

    Args:
        model: the network.
        side: S of its squares.
        scale: 1 / deviation of its latents; None for what its configuration says.
    """

    def __init__(self, model: Any, side: int, scale: float | None = None) -> None:
        super().__init__()
        self.model = model
        config = model.config
        grid = side // 2 ** (len(config.block_out_channels) - 1)
        self.channels, self.latent = int(config.in_channels), (int(config.latent_channels), grid, grid)
        self.register_buffer("stored_scale", torch.tensor(float(scale or config.scaling_factor)))

    @property
    def scale(self) -> float:  # type: ignore[override]
        return float(self.stored_scale)  # type: ignore[arg-type]  # a buffer, so that it is saved with the weights

    def encode(self, squares: Tensor) -> Tensor:
        return self.posterior(squares).mean  # type: ignore[no-any-return]

    def posterior(self, squares: Tensor) -> Any:
        """The distribution of the latents, of diffusers."""
        return self.model.encode(squares).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample  # type: ignore[no-any-return]


def halvings(longest: int) -> int:
    """How often a KL autoencoder halves images, for latents of about 16 x 16."""
    return max(1, (longest // 16).bit_length() - 1)


def small_kl(channels: int, side: int, times: int, rng: Rng) -> KL:
    """A KL autoencoder with random weights, that halves images so many times; its latents have four channels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths = (32, *(64 for _ in range(times)))
    cpu = torch.device("cpu")
    with isolated_global_rng(cpu):  # the library's layers know no generator
        seed_global(rng.integer("autoencoder"), cpu)
        model = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=side,
        )
    return KL(model, side, 1.0)


def _patches(squares: Tensor, patch: int) -> Tensor:
    """(B, g, g, C p²)."""
    count, channels, height, width = squares.shape
    cut = squares.view(count, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
