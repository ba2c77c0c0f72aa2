"""Denoisers, what they say of a noisy latent, and how they are built small.

A latent z gets noise ε at one of T times: x_t = √ᾱ_t z + √(1 − ᾱ_t) ε. A denoiser predicts ε, or z, or the velocity
v = √ᾱ_t ε − √(1 − ᾱ_t) z, from x_t, t and a class; the others follow. With classifier-free guidance of scale w
(Ho & Salimans, arXiv 2207.12598) it is asked twice, with the class and without::

    prediction = without + w (with − without)

The transformer is that of Peebles & Xie, DiT (arXiv 2212.09748).
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsdistill.core.config import settings_digest
from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.errors import InvalidSetting
from dsdistill.networks import parameter_digest

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Schedule:
    """Noise levels: ᾱ (T,), float64, on the CPU, and what is predicted ("epsilon", "sample", "v_prediction").

    Args:
        config: of a scheduler of diffusers.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.config = {key: value for key, value in config.items() if not key.startswith("_")}
        made: Any = DDPMScheduler(
            num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
            beta_start=float(config.get("beta_start", 1e-4)),
            beta_end=float(config.get("beta_end", 0.02)),
            beta_schedule=str(config.get("beta_schedule", "linear")),
            trained_betas=config.get("trained_betas"),
        )
        self.kept = (1 - made.betas.double()).cumprod(0)
        self.prediction = str(config.get("prediction_type", "epsilon"))
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def times(self) -> int:
        """T."""
        return len(self.kept)

    def respaced(self, steps: int) -> Tensor:
        """(steps,) int64, descending: evenly from T - 1 to 0, as the code of DiT respaces them.

        Raises:
            InvalidSetting: there are more steps than levels.
        """
        if steps > self.times:
            raise InvalidSetting("sampler.steps", steps, f"at most {self.times}, the noise levels of the denoiser")
        return torch.linspace(0, self.times - 1, steps, dtype=torch.float64).round().long().flip(0)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t of scaled latents (B, c, g, g) at times (B,)."""
        kept = self.at(times, latents)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What is to be predicted."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        kept = self.at(times, latents)
        return kept.sqrt() * noise - (1 - kept).sqrt() * latents

    def clean(self, prediction: Tensor, noisy: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """x̂0 and ε̂ of a prediction."""
        kept = self.at(times, noisy)
        signal, rest = kept.sqrt(), (1 - kept).sqrt()
        if self.prediction == "epsilon":
            return (noisy - rest * prediction) / signal, prediction
        if self.prediction == "sample":
            return prediction, (noisy - signal * prediction) / rest
        return signal * noisy - rest * prediction, signal * prediction + rest * noisy

    def at(self, times: Tensor, like: Tensor) -> Tensor:
        """ᾱ (B, 1, 1, 1) at times (B,), as ``like``."""
        place = (like.device, like.dtype)
        if place not in self._there:  # copied once: a step on a device waits for no host memory
            self._there[place] = self.kept.to(*place)
        return self._there[place][times.to(like.device)].view(-1, 1, 1, 1)


def lowered(device: torch.device) -> torch.autocast:
    """Networks in bfloat16 on CUDA, as they are elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Said(NamedTuple):
    """What a denoiser says: x̂0 and ε̂ (B, c, g, g), and of a learned variance v in [0, 1], None where it is fixed."""

    clean: Tensor
    noise: Tensor
    variance: Tensor | None


class Denoiser(nn.Module):
    """A network of diffusers with its noise levels; classes are numbered as those of the images.

    Args:
        network: takes latents and times.
        schedule: its noise levels.
    """

    def __init__(self, network: Any, schedule: Schedule) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    @property
    def channels(self) -> int:
        """c."""
        return int(self.network.config.in_channels)

    @property
    def digest(self) -> str:
        """sha256 of all that decides what it says: weights, noise levels, and what it is told of classes."""
        return settings_digest({"parameters": parameter_digest(self), "schedule": self.schedule.config})

    @abstractmethod
    def forward(self, noisy: Tensor, times: Tensor, classes: Tensor, drop: Tensor | None = None) -> Tensor:
        """The raw output at times (B,) for classes (B,); where ``drop`` (B,) says so, for none."""

    def predicted(self, noisy: Tensor, times: Tensor, classes: Tensor, drop: Tensor) -> Tensor:
        """The raw output, of a network that works in bfloat16 on CUDA, as ``noisy`` is."""
        with lowered(noisy.device):
            found: Tensor = self(noisy, times, classes, drop).to(noisy.dtype)
        return found

    @torch.no_grad()
    def said(
        self,
        noisy: Tensor,
        time: int,
        classes: Tensor,
        guidance: float,
        guided: int | None = None,
        ask: Callable[..., Tensor] | None = None,
    ) -> Said:
        """What it says of x_t (B, c, g, g) at one time.

        Args:
            classes: (B,).
            guidance: w; at 1 it is asked once.
            guided: channels that guidance is for, the first ones, at most c; None for all. DiT's code guides three.
            ask: `predicted`, or what replays it.
        """
        ask = self.predicted if ask is None else ask
        asked = 1 if guidance == 1 else 2
        times = torch.full((asked * len(noisy),), time, device=noisy.device)
        drop = torch.arange(len(times), device=noisy.device) >= len(noisy)
        channels = noisy.shape[1]
        raw = ask(noisy.repeat(asked, 1, 1, 1), times, classes.repeat(asked), drop)
        if asked == 2:
            told, plain = raw.chunk(2)
            raw = told.clone()
            some = slice(0, channels if guided is None else guided)
            raw[:, some] = plain[:, some] + guidance * (told[:, some] - plain[:, some])
        variance = (raw[:, channels:] + 1) / 2 if raw.shape[1] == 2 * channels else None
        clean, noise = self.schedule.clean(raw[:, :channels], noisy, times[: len(noisy)])
        return Said(clean, noise, variance)


class ByClass(Denoiser):
    """A `DiTTransformer2DModel`, that knows classes by numbers of its own.

    Args:
        network: of diffusers.
        schedule: its noise levels.
        null: its number for no class.
        ids: its number of each class of the images, (K,) int64; None where they are the same.
    """

    ids: Tensor | None

    def __init__(self, network: Any, schedule: Schedule, *, null: int, ids: Tensor | None = None) -> None:
        super().__init__(network, schedule)
        self.null = null
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, noisy: Tensor, times: Tensor, classes: Tensor, drop: Tensor | None = None) -> Tensor:
        own = classes if self.ids is None else self.ids[classes]
        own = own if drop is None else torch.where(drop, self.null, own)
        result: Tensor = self.network(noisy, timestep=times, class_labels=own).sample
        return result


class ByText(Denoiser):
    """A `UNet2DConditionModel`, that is told classes by the token states of their prompts.

    Args:
        network: of diffusers.
        schedule: its noise levels.
        states: of each class, (K, T, D).
        negative: (T, D), of the prompt for no class.
    """

    states: Tensor
    negative: Tensor

    def __init__(self, network: Any, schedule: Schedule, states: Tensor, negative: Tensor) -> None:
        super().__init__(network, schedule)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("negative", negative, persistent=False)

    def forward(self, noisy: Tensor, times: Tensor, classes: Tensor, drop: Tensor | None = None) -> Tensor:
        states = self.states[classes]
        if drop is not None:
            states = torch.where(drop[:, None, None], self.negative, states)
        result: Tensor = self.network(noisy, times, encoder_hidden_states=states).sample
        return result


COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "num_train_timesteps": 1000}
"""Noise levels of denoisers that are trained here."""


def small_transformer(
    latent: tuple[int, int, int], classes: int, layers: int, heads: int, width: int, rng: Rng
) -> ByClass:
    """A DiT with random weights that predicts v; with adaLN-zero, so that it begins as 0.

    The library drops labels in each block on its own, of which guidance learns nothing: here that is off, and whoever
    trains drops them once, to ``null``.

    Args:
        latent: (c, g, g).
        layers, heads, width: of the transformer; the width is that of one head.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    channels, grid, _ = latent
    cpu = torch.device("cpu")
    with isolated_global_rng(cpu):  # the library's layers know no generator
        seed_global(rng.integer("denoiser"), cpu)
        network = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            sample_size=grid,
            patch_size=tokens_of(grid),
            num_embeds_ada_norm=classes,
        )
        for name, part in network.named_modules():
            if isinstance(part, nn.Embedding) or ("timestep_embedder.linear" in name and isinstance(part, nn.Linear)):
                nn.init.normal_(part.weight, std=0.02)
        for zeroed in [
            *(block.norm1.linear for block in network.transformer_blocks),
            network.proj_out_1,
            network.proj_out_2,
        ]:
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
    without_dropped_labels(network)
    return ByClass(network, Schedule(COSINE), null=classes)


def without_dropped_labels(network: nn.Module) -> None:
    """Have no block drop labels on its own."""
    for part in network.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0  # type: ignore[assignment]


def tokens_of(grid: int) -> int:
    """Side of the patches that a transformer takes latents of a grid in."""
    return 2 if grid >= 8 and grid % 2 == 0 else 1
