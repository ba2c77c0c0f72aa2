"""Training small autoencoders and denoisers on the images of a run: the models that need no pretrained weights.

The autoencoder is closed-form (`PatchPCA`) or a `KL` one, which minimises, over mirrored images too::

    |x − x̂| + 0.1 (x − x̂)² (means over pixels) + 1e-6 KL(q(z | x) ‖ N(0, I)) (sum over latents)

A denoiser minimises ‖v − v̂(x_t, t, y)‖² over latents, times and noise, with the class y left out of a tenth; what is
used is a moving average of its weights. Every step draws from streams of its own, so a training that was interrupted
goes on to the same bits.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm

from dsdistill.core.device import synchronize
from dsdistill.core.replay import WARM, Rate, Replayed, compiled, forget_gradients, replayable
from dsdistill.core.rng import Rng
from dsdistill.engine import Run
from dsdistill.errors import InvalidSetting, Stopped
from dsdistill.experts.progress import Progress
from dsdistill.generative.autoencoder import KL
from dsdistill.generative.denoiser import Denoiser, lowered

logger = logging.getLogger("dsdistill")
_REHEARSED = 3  # steps that are timed
_BLOCK = 50  # steps between two looks at signals and clocks
FEW = 1_000_000
"""Latents that a denoiser should have seen for images worth looking at."""


@dataclass(frozen=True)
class Size:
    """How large a model is, and how long it is trained.

    ``pca``: closed-form autoencoder; ``layers``, ``heads`` of ``width`` each; latents in a ``batch``; step size ``lr``;
    latents seen, ``samples``; images that a KL autoencoder sees, ``images``.
    """

    pca: bool
    layers: int
    heads: int
    width: int
    batch: int
    lr: float
    samples: int
    images: int = 500_000


SIZES: Mapping[str, Size] = {
    "nano": Size(True, 4, 4, 32, 64, 1e-3, 60_000),
    "small": Size(False, 8, 4, 64, 512, 3e-4, 30_720_000),
    "base": Size(False, 12, 6, 64, 512, 3e-4, 51_200_000),
}
"""By name: for a CPU, for a GPU, and for a GPU with more time."""


@dataclass
class Budget:
    """Steps of a training, or fewer where ``seconds`` are over; ``done`` of them are behind it."""

    steps: int
    seconds: float | None = None
    done: int = 0

    def __post_init__(self) -> None:
        self._begun = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether no step is left, or no time."""
        late = self.seconds is not None and time.monotonic() - self._begun > self.seconds
        return self.done >= self.steps or (late and self.done > 0)


def repeated(
    run: Run,
    what: str,
    budget: Budget,
    kept: Progress,
    step: Callable[[int], Tensor],
    mend: str = "take another seed, or another size",
) -> float:
    """Make the steps of a budget; an interrupted training goes on after those that were kept.

    In a rehearsal a few are made, and the time of the others is put down.

    Args:
        step: makes one, and gives its loss.
        mend: what to do if the loss stops being finite.

    Returns:
        The mean loss of the last steps.

    Raises:
        InvalidSetting: the loss stopped being finite. Stopped: the run was asked to stop.
    """
    rehearsal = run.shared.rehearsal
    first = 1 + WARM if run.device.type == "cuda" else 1  # the steps before those that are like all others
    if rehearsal is not None and budget.steps > first + _REHEARSED:
        for number in range(first):
            step(number)
        synchronize(run.device)
        begin = time.perf_counter()
        for number in range(first, first + _REHEARSED):
            step(number)
        synchronize(run.device)
        each = (time.perf_counter() - begin) / _REHEARSED
        longest = math.inf if budget.seconds is None else budget.seconds
        rehearsal.seconds += min(each * (budget.steps - first - _REHEARSED), longest)
        return math.nan
    budget.done = kept.read()
    if rehearsal is None and not budget.over:
        limit = "" if budget.seconds is None else f", for at most {budget.seconds:.0f} s"
        behind = f", {budget.done} of them are done" if budget.done else ""
        logger.info("training %s: %d steps%s%s", what, budget.steps, behind, limit)
    losses: list[Tensor] = []
    with tqdm(total=budget.steps, initial=budget.done, desc=what, unit="step", disable=None) as bar:
        try:
            while not budget.over:
                losses = [step(number) for number in range(budget.done, min(budget.steps, budget.done + _BLOCK))]
                budget.done += len(losses)
                bar.update(len(losses))
                if not bool(torch.isfinite(losses[-1])):
                    raise InvalidSetting("models", what, f"diverged: {mend}")
                kept.add(budget.done)
                run.shared.give_way()
        except Stopped:  # raised between blocks; whatever else ends it may have left the weights in mid-block
            kept.write()
            raise
        finally:
            forget_gradients(kept.network)
    return float(torch.stack(losses).mean()) if losses else math.nan


def grow_autoencoder(
    run: Run, model: KL, fetch: Callable[[Tensor], Tensor], count: int, images: int, rng: Rng, folder: Path | None
) -> None:
    """Train it in place, and give its latents unit deviation by ``stored_scale``.

    Args:
        fetch: squares (B, C, S, S) of real images by their rows, on the device.
        count: of real images.
        images: to see; fewer where there are less than the 128 of a mini-batch.
    """
    optimizer = torch.optim.Adam(model.model.parameters(), lr=5e-4, **replayable(run.device))
    batch = min(128, count)
    budget = Budget(max(1, images // 128))

    def update(squares: Tensor, spread: Tensor) -> Tensor:
        optimizer.zero_grad()
        with lowered(run.device):
            posterior = model.posterior(squares)
            made = model.decode(posterior.mean + posterior.std * spread)
            distance = l1_loss(made.float(), squares) + 0.1 * mse_loss(made.float(), squares)
            loss = distance + 1e-6 * posterior.kl().mean()
        loss.backward()
        optimizer.step()
        result: Tensor = loss.detach()
        return result

    replayed = Replayed(update, run.device)

    def step(number: int) -> Tensor:
        generator = rng.at("autoencoder", number, device=run.device)
        rows = torch.randint(count, (batch,), generator=generator, device=run.device)
        squares = fetch(rows)
        if run.source.mirror_safe and number % 2:
            squares = squares.flip(3)
        spread = torch.randn((batch, *model.latent), generator=generator, device=run.device)
        return replayed(squares, spread)

    repeated(run, "the autoencoder", budget, Progress(folder, model, optimizer), step)
    with torch.no_grad():
        rows = torch.randperm(count, generator=rng.at("scale", device=run.device), device=run.device)[:2000]
        latents = torch.cat([model.encode(fetch(part)) for part in torch.split(rows, run.chunk)])
        model.stored_scale.fill_(1 / max(float(latents.std()), 1e-6))  # type: ignore[operator]


def grow_denoiser(
    run: Run,
    denoiser: Denoiser,
    latents: Tensor,
    classes: Tensor,
    size: Size,
    samples: int,
    seconds: float | None,
    rng: Rng,
    folder: Path | None,
) -> int:
    """Train it in place; its weights become their moving average.

    Args:
        latents: scaled, (F, N, c, g, g), of real images, and of mirrored ones where F is 2.
        classes: (N,) int64.
        samples: latents to see.
        seconds: at most so long; None without limit.

    Returns:
        Latents that were seen.
    """
    average = copy.deepcopy(denoiser)
    both = nn.ModuleDict({"model": denoiser, "average": average})
    device = run.device
    options = {"lr": size.lr, "betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(denoiser.parameters(), **options, **replayable(device))  # type: ignore[arg-type]
    batch = min(size.batch, 4 * latents.shape[1])
    budget = Budget(max(1, samples // batch), seconds)
    warmup = min(500, max(1, budget.steps // 10))

    def update(*drawn: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = denoising_loss(denoiser, Noised(*drawn), ask)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    # A rehearsal makes a few steps only, and says twice the time of a training that is compiled.
    ask = compiled(denoiser.predicted, device, 0 if run.shared.rehearsal else budget.steps, seconds)
    replayed, rate = Replayed(update, device), Rate(optimizer, device)

    def step(number: int) -> Tensor:
        rate.set(size.lr * min(1.0, (number + 1) / warmup))
        generator = rng.at("denoiser", number, device=device)
        loss = replayed(*Noised.drawn(latents, classes, batch, denoiser.schedule.times, generator))
        follow(average, denoiser, min(0.9999, (1 + number) / (10 + number)))
        return loss

    denoiser.train()
    loss = repeated(run, "the denoiser", budget, Progress(folder, both, optimizer), step)
    denoiser.load_state_dict(average.state_dict())
    denoiser.eval().requires_grad_(False)
    seen = budget.done * batch
    if run.shared.rehearsal is None:
        few = f"; below {FEW:,} images may show little more than the colours of their class" if seen < FEW else ""
        logger.log(
            logging.WARNING if few else logging.INFO,
            "the denoiser saw %s latents (loss %.3f)%s",
            f"{seen:,}",
            loss,
            few,
        )
    return seen


class Noised(NamedTuple):
    """What a step learns from: clean latents (B, c, g, g), noise, times (B,), classes (B,), and whom to tell none."""

    clean: Tensor
    noise: Tensor
    times: Tensor
    classes: Tensor
    drop: Tensor

    @classmethod
    def drawn(cls, latents: Tensor, classes: Tensor, batch: int, times: int, generator: torch.Generator) -> "Noised":
        """Of latents (F, N, c, g, g) of classes (N,), on their device."""
        device, (flips, count) = latents.device, latents.shape[:2]
        rows = torch.randint(count, (batch,), generator=generator, device=device)
        sides = torch.randint(flips, (batch,), generator=generator, device=device)
        own = torch.randint(times, (batch,), generator=generator, device=device)
        drop = torch.rand(batch, generator=generator, device=device) < 0.1
        clean = latents[sides, rows]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        return cls(clean, noise, own, classes[rows], drop)


def denoising_loss(denoiser: Denoiser, seen: Noised, ask: Callable[..., Tensor] | None = None) -> Tensor:
    """Mean squared error of what a denoiser predicts; ``ask`` is its `predicted`, or the same compiled."""
    schedule, ask = denoiser.schedule, denoiser.predicted if ask is None else ask
    noisy = schedule.noisy(seen.clean, seen.noise, seen.times)
    found = ask(noisy, seen.times, seen.classes, seen.drop)
    return mse_loss(found.float()[:, : noisy.shape[1]], schedule.target(seen.clean, seen.noise, seen.times))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay average + (1 − decay) model."""
    kept, new = ([parameter.detach() for parameter in one.parameters()] for one in (average, model))
    torch._foreach_lerp_(kept, new, 1 - decay)
