"""Drawing latents from a denoiser: by DDPM, DDIM or DPM-Solver++, on the way pulled towards modes.

With ᾱ at the current time and ᾱ' at the next of the respaced ones, α = ᾱ / ᾱ', β = 1 − α::

    DDPM (Ho et al., arXiv 2006.11239):   x ← √ᾱ' β / (1 − ᾱ) x̂0 + √α (1 − ᾱ') / (1 − ᾱ) x + σ n,
                                          σ² = β̃ = β (1 − ᾱ') / (1 − ᾱ), or exp(v log β + (1 − v) log β̃) where learned
    DDIM (Song et al., arXiv 2010.02502): x ← √ᾱ' x̂0 + √(1 − ᾱ') ε̂

A pull λ towards a latent m (MGD3, Chan-Santiago et al., arXiv 2505.18963) adds λ σ (m − x̂0) to a DDPM step, and takes
√(1 − ᾱ) λ (m − x̂0) from ε̂ before a DDIM step, for as long as more than ``until`` steps are left.

Noise is that of each image, drawn before the first step from a stream of its own: an image is the same whatever is
drawn beside it.
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.core.replay import Replayed
from dsdistill.errors import InvalidSetting
from dsdistill.generative.denoiser import Denoiser, Said, Schedule


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How latents are drawn.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    kind: Literal["ddpm", "ddim", "dpm"] = "ddim"
    """DDPM draws noise at every step; DDIM none after the first; DPM-Solver++ (second order) needs fewer steps."""
    steps: Annotated[int, Ge(2)] = 50
    """Of the denoiser, spaced evenly over its noise levels."""
    guidance: Annotated[float, Ge(0)] = 2.0
    """w of classifier-free guidance; 1 for none. Pretrained DiTs take 4."""
    guided: Annotated[int, Ge(1)] | None = None
    """Channels of the latent that guidance is for, the first ones; null: all. The code of DiT guides three of four."""

    def __post_init__(self) -> None:
        validate(self)


DIT = Sampler(kind="ddpm", steps=50, guidance=4.0, guided=3)
"""As the code of Minimax, MGD3 and EVLF samples DiT-XL/2 at 256 pixels."""


class Pull(NamedTuple):
    """Towards ``modes`` (B, c, g, g), by ``strength`` λ, while more than ``until`` steps are left."""

    modes: Tensor
    strength: float
    until: int


class Start(NamedTuple):
    """Begin from latents (B, c, g, g) with the noise of this share of the way, instead of from noise alone."""

    latents: Tensor
    strength: float


def noise_numbers(sampler: Sampler) -> int:
    """How many noise latents an image takes."""
    return 1 + (sampler.steps if sampler.kind == "ddpm" else 0)


@torch.no_grad()
def drawn(
    denoiser: Denoiser,
    classes: Tensor,
    noise: Tensor,
    sampler: Sampler,
    *,
    pull: Pull | None = None,
    start: Start | None = None,
) -> Tensor:
    """Scaled latents (B, c, g, g).

    Args:
        classes: (B,) int64.
        noise: (n, B, c, g, g), N(0, 1), n as `noise_numbers` says.
        pull: towards modes; not with "dpm".
        start: from latents.

    Raises:
        InvalidSetting: a pull with "dpm".
    """
    schedule = denoiser.schedule
    times = schedule.respaced(sampler.steps)
    skipped = 0 if start is None else sampler.steps - max(1, min(sampler.steps, int(start.strength * sampler.steps)))
    first = torch.full((len(classes),), int(times[skipped]), device=noise.device)
    latents = noise[0] if start is None else schedule.noisy(start.latents, noise[0], first)
    ask = Replayed(denoiser.predicted, noise.device, sampler.steps - skipped)
    if sampler.kind == "dpm":
        if pull is not None:
            raise InvalidSetting("sampler.kind", "dpm", "'ddpm' or 'ddim', where latents are pulled")
        return _by_solver(denoiser, ask, classes, latents, sampler, times[skipped:])
    for place in range(skipped, sampler.steps):
        said = denoiser.said(latents, int(times[place]), classes, sampler.guidance, sampler.guided, ask)
        step = _Step.of(schedule.kept, times, place, said)
        left = sampler.steps - 1 - place
        gap = None if pull is None or left <= pull.until else pull.strength * (pull.modes - said.clean)
        ddim = sampler.kind == "ddim"
        latents = step.ddim(said, gap) if ddim else step.ddpm(latents, said, noise[1 + place], gap)
    return latents


def furthest(schedule: Schedule, sampler: Sampler, until: int) -> float:
    """The most that a DDIM step which is pulled by λ = 1 moves a latent towards a mode, in units of the way there."""
    times = schedule.respaced(sampler.steps)
    kept = torch.cat([schedule.kept[times], torch.ones(1, dtype=torch.float64)])
    now, then = kept[:-1], kept[1:]
    moved = (1 - now).sqrt() * ((then * (1 - now) / now).sqrt() - (1 - then).sqrt())
    pulled = torch.arange(sampler.steps - 1, -1, -1) > until
    return float(moved[pulled].max()) if bool(pulled.any()) else 0.0


class _Step(NamedTuple):
    """ᾱ now and at the next time, 1 after the last, and what a learned variance is."""

    now: float
    then: float
    variance: Tensor | None

    @classmethod
    def of(cls, kept: Tensor, times: Tensor, place: int, said: Said) -> "_Step":
        then = float(kept[times[place + 1]]) if place + 1 < len(times) else 1.0
        return cls(float(kept[times[place]]), then, said.variance)

    def ddim(self, said: Said, gap: Tensor | None) -> Tensor:
        clean, noise = said.clean, said.noise
        if gap is not None:  # x_t stays, so what the noise loses the clean latent gains
            noise = noise - (1 - self.now) ** 0.5 * gap
            clean = clean + (1 - self.now) / self.now**0.5 * gap
        result: Tensor = self.then**0.5 * clean + (1 - self.then) ** 0.5 * noise
        return result

    def ddpm(self, latents: Tensor, said: Said, noise: Tensor, gap: Tensor | None) -> Tensor:
        if self.then == 1.0:
            last: Tensor = said.clean
            return last  # no noise is added at the end
        alpha = self.now / self.then
        beta = 1 - alpha
        least = beta * (1 - self.then) / (1 - self.now)
        mean = self.then**0.5 * beta / (1 - self.now) * said.clean
        mean = mean + alpha**0.5 * (1 - self.then) / (1 - self.now) * latents
        if self.variance is None:
            deviation: Tensor | float = least**0.5
        else:
            logs = torch.tensor([beta, least], dtype=torch.float64).log().to(latents)
            deviation = (0.5 * (self.variance * logs[0] + (1 - self.variance) * logs[1])).exp()
        pulled: Tensor = mean if gap is None else mean + deviation * gap
        return pulled + deviation * noise


def _by_solver(
    denoiser: Denoiser, ask: Replayed, classes: Tensor, latents: Tensor, sampler: Sampler, times: Tensor
) -> Tensor:
    """DPM-Solver++ of diffusers (Lu et al., arXiv 2211.01095), on predictions of the clean latent."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    config = {**denoiser.schedule.config, "prediction_type": "sample", "algorithm_type": "dpmsolver++"}
    known = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
    kept: dict[str, Any] = {key: value for key, value in config.items() if key in {*known, "algorithm_type"}}
    solver = DPMSolverMultistepScheduler(**kept, solver_order=2, timestep_spacing="linspace")
    with warnings.catch_warnings():  # of its use of NumPy
        warnings.simplefilter("ignore", DeprecationWarning)
        solver.set_timesteps(timesteps=times.tolist())
    for time in solver.timesteps:
        said = denoiser.said(latents, int(time), classes, sampler.guidance, sampler.guided, ask)
        latents = solver.step(said.clean, time, latents).prev_sample
    return latents
