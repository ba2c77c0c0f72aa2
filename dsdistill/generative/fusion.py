"""EVLF: the name of a class is mixed into latents before any denoiser sees them.

EVLF: Early Vision-Language Fusion for Generative Dataset Distillation, CVPR 2026, arXiv 2603.07476. With μ the unscaled
mean of an autoencoder's latent, e_y the token states of the prompt of its class, t_y the state at the end of the text,
a fusion F and a projector P, which training alone uses::

    min_{F, P}  λ₁ · L_NCE(P(μ'), t_y) + λ₂ · mean (μ' − μ)²,     μ' = F(μ, ẽ_y)
    L_NCE = ½ Σ over both directions of mean_i −log mean_{j: y_j = y_i} softmax_j(ẑ_i · t̂_j / T)

ẽ is e with elements dropped and noise added, or all zero for a whole batch now and then; the target t is always clean.
λ₂ rises linearly over the first half of the steps. Two presets:

- ``residual`` (default): μ' = μ + Conv(h) with a convolution that begins at zero. Before training F is the identity to
  the last bit, so that a fusion that learned little can do no harm.
- the authors' (``residual=False``): μ' = Conv(h); what F keeps of μ it learns from λ₂ alone.

Departures beside that: all of a mini-batch of 32 are contrasted at once, where the authors accumulate the gradients of
two of 16; the vector of a prompt is at its first end token, where theirs is padding; float32 throughout, where theirs
runs the frozen encoders in half precision. As in their code (not their text), keys and values hold the image tokens too
and stay those of the input in all layers, unless ``refresh``; and the temperature, a parameter that no optimizer of
theirs is given, is a constant.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention

from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.generative.text import HEADS


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How latents are fused with the names of their classes, and how that is learned.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range, or says nothing beside the others.
    """

    width: Annotated[int, Ge(1)] = 256
    """Numbers of each token inside the module."""
    heads: Annotated[int, Ge(1)] = 4
    """Of its attention; they divide the width."""
    layers: Annotated[int, Ge(1)] = 2
    """Of attention and MLP."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Of attention weights and inside the MLPs, while it is trained."""
    residual: bool = True
    """The module adds to a latent, beginning with nothing; false: it replaces it, as the authors' does."""
    refresh: bool = False
    """Each layer attends to the tokens as they are by then; false: to those of the input, as the authors' do."""
    template: str = "{}"
    """The prompt of a class, with {} for its name."""
    text: str | None = None
    """Folder or Hub id of a CLIP text encoder (extra "text"); null: an encoder of letters is trained as well."""
    revision: str | None = None
    """Of a repository of the Hub: a commit."""
    download: bool = False
    """Fetch the text encoder from the Hub if it is not in the local cache."""
    text_width: Annotated[int, Ge(1)] = 128
    """Numbers of each token of the encoder of letters; a multiple of 4."""
    steps: Annotated[int, Ge(1)] = 600
    """Of training; the authors' 4 epochs of ten classes of ImageNet are 1600 (preset "dit" of EVLF)."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Latents of each step; all of them, if there are fewer."""
    lr: Annotated[float, Gt(0)] = 3e-4
    """Step size of AdamW on the module."""
    lr_projector: Annotated[float, Gt(0)] = 1e-4
    """Step size on the projector."""
    lr_text: Annotated[float, Gt(0)] = 3e-4
    """Step size on the encoder of letters."""
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    """Of AdamW, on all of them."""
    clip: Annotated[float, Gt(0)] = 1.0
    """The norm of the gradient of all of them together is at most this."""
    temperature: Annotated[float, Gt(0)] = 0.07
    """T of the contrastive loss."""
    alignment: Annotated[float, Ge(0)] = 0.1
    """λ₁, weight of the contrastive loss."""
    closeness: tuple[float, float] = (0.05, 1.0)
    """λ₂, weight of the squared difference to the latent: at first, and from half of the steps on."""
    drop_text: Annotated[float, Ge(0), Le(1)] = 0.2
    """Probability that a whole batch sees zeros for its text."""
    text_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the numbers of the text states that are dropped otherwise."""
    text_noise: Annotated[float, Ge(0)] = 0.01
    """Standard deviation of the noise that is added to them."""

    def __post_init__(self) -> None:
        validate(self)
        object.__setattr__(self, "closeness", tuple(map(float, self.closeness)))
        if self.width % self.heads:
            raise InvalidSetting("Fusion.heads", self.heads, f"a divisor of the width, {self.width}")
        if self.text_width % HEADS:
            raise InvalidSetting("Fusion.text_width", self.text_width, f"a multiple of {HEADS}")
        if min(self.closeness) < 0:
            raise InvalidSetting("Fusion.closeness", self.closeness, "two weights that are not negative")
        if self.template.count("{}") != 1:
            raise InvalidSetting("Fusion.template", self.template, "exactly one {}, where the name of the class goes")
        if self.text is not None and self.text_width != Fusion.text_width:
            told = "left out beside text, whose states are as wide as they are"
            raise InvalidSetting("Fusion.text_width", self.text_width, told)
        if self.text is None and (self.revision is not None or self.download):
            given = "revision" if self.revision is not None else "download"
            raise InvalidSetting(f"Fusion.{given}", getattr(self, given), "left out, unless text names an encoder")


class FusionModule(nn.Module):
    """Mixes token states of a prompt into latents.

    Latents become tokens h by a 1x1 convolution and a learned position each, text states become tokens u by a linear
    map, without positions: their order, where it matters, is in the states. Each layer, norms last::

        h ← LN(h + attention(h, kv, kv)),  h ← LN(h + MLP(h)),     kv = (h₀, u), or (h, u) with ``refresh``

    Args:
        channels: c of the latents.
        grid: (h, w) of the latents; sizes the table of positions.
        text_dim: D of the text states.
        width: of a token.
        heads: of the attention; they divide the width.
        layers: how many.
        dropout: of attention weights and in the MLPs, while training.
        residual: add what comes out to the latent, through a convolution that begins at zero. Latents of another grid
            get positions by bilinear interpolation; without ``residual`` they are refused.
        refresh: recompute keys and values from the current tokens in each layer.

    Raises:
        InvalidSetting: the heads do not divide the width.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        text_dim: int,
        width: int = 256,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        residual: bool = True,
        refresh: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise InvalidSetting("heads", heads, f"a divisor of the width, {width}")
        self.channels, self.grid, self.text_dim = channels, (grid[0], grid[1]), text_dim
        self.residual, self.refresh = residual, refresh
        self.enter = nn.Conv2d(channels, width, 1)
        self.text = nn.Linear(text_dim, width)
        self.positions = nn.Parameter(torch.randn(1, grid[0] * grid[1], width))
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.leave = nn.Conv2d(width, channels, 1)
        if residual:
            nn.init.zeros_(self.leave.weight)
            assert self.leave.bias is not None
            nn.init.zeros_(self.leave.bias)

    def forward(self, latents: Tensor, texts: Tensor) -> Tensor:
        """Fused latents.

        Args:
            latents: (B, c, h, w), unscaled.
            texts: (B, T, D), a prompt for each.

        Returns:
            (B, c, h, w).

        Raises:
            ShapeMismatch: an argument has another shape, or another grid where that is refused.
        """
        self._check(latents, texts)
        grid = (latents.shape[2], latents.shape[3])
        begun = self.enter(latents).flatten(2).transpose(1, 2) + self._positions(grid)
        words, tokens = self.text(texts), begun
        for layer in self.layers:
            seen = torch.cat([tokens if self.refresh else begun, words], 1)
            tokens = layer(tokens, seen)
        result: Tensor = self.leave(tokens.transpose(1, 2).reshape(len(latents), -1, *grid))
        return latents + result if self.residual else result

    def _check(self, latents: Tensor, texts: Tensor) -> None:
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ShapeMismatch("latents", tuple(latents.shape), f"(B, {self.channels}, h, w)")
        if not self.residual and tuple(latents.shape[2:]) != self.grid:
            wanted = f"(B, {self.channels}, {self.grid[0]}, {self.grid[1]}), the grid that the fusion was made for"
            raise ShapeMismatch("latents", tuple(latents.shape), f"{wanted}; only a residual one takes others")
        if texts.dim() != 3 or len(texts) != len(latents) or texts.shape[2] != self.text_dim:
            raise ShapeMismatch("text states", tuple(texts.shape), f"({len(latents)}, T, {self.text_dim})")

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, h * w, width)."""
        if grid == self.grid:
            return self.positions
        table = self.positions.transpose(1, 2).reshape(1, -1, *self.grid)
        return interpolate(table, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


class _Layer(nn.Module):
    """Attention of image tokens to given ones and an MLP, each with a norm behind the sum; weights as in PyTorch's."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        # Queries, keys and values in one matrix, which is what the initial spread of `nn.MultiheadAttention` is of.
        self.qkv = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.joined.bias)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """(B, N, width), from tokens as large and those (B, M, width) that they attend to."""
        width = tokens.shape[2]
        query = linear(tokens, self.qkv.weight[:width], self.qkv.bias[:width])
        key, value = linear(seen, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)
        found = scaled_dot_product_attention(
            self._split(query),
            self._split(key),
            self._split(value),
            dropout_p=self.dropout if self.training else 0.0,
        )
        tokens = self.norm1(tokens + self.joined(found.transpose(1, 2).flatten(2)))
        result: Tensor = self.norm2(tokens + self.mlp(tokens))
        return result

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, heads, N, width of a head)."""
        return tokens.view(*tokens.shape[:2], self.heads, -1).transpose(1, 2)
