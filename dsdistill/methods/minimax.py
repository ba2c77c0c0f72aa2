"""Minimax diffusion (Gu et al., Efficient Dataset Distillation via Minimax Diffusion, arXiv 2311.15529).

The denoiser is fine-tuned on the real latents with two terms on x̂0, the clean latents that it predicts of a mini-batch
at random noise levels. Each class c has memories: M_c of real latents, D_c of what was predicted before. With the n_b
classes of the mini-batch and the cosine of flattened latents::

    L = L_denoising + λ_r / n_b Σ_c (1 − min_{i ∈ c, m ∈ M_c} cos(x̂0_i, m))         representative of all that is real
                    + λ_d / n_b Σ_c max_{i ∈ c, d ∈ D_c} cos(x̂0_i, d)               unlike what was predicted before

so the real latent that is least like the batch is approached, and the prediction most like an earlier one is moved
away. A class whose memory is empty has no term. Then images are drawn by class, from a moving average of the weights.

Trained are the biases and the class tables, the part of the paper's "DiffFit" that needs no new parameters;
λ_r = 0.002, λ_d = 0.008, memories of 64, AdamW at 1e-3, mini-batches of 8 and about 12,000 steps are the paper's, for
ten classes.

L_denoising is the mean squared error of the noise, and for a DiT with learned variances the bound of
`dsdistill.generative.bound` beside it.

Departures: no scales are added to layers (DiffFit's γ). Latents are means of the autoencoder's posterior. The library's
transformer has class table and time embedding in every block, each of which is trained, where the authors' has one.
Many classes are the paper's maintainers' phases of about 20, each from the original weights: here `classes_at_once`.
With Stable Diffusion the class is left out by its negative prompt.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from dsdistill.core import storage
from dsdistill.core.config import settings_digest
from dsdistill.core.replay import Replayed, replayable
from dsdistill.core.rng import Rng
from dsdistill.engine import Preset, Run, Shared
from dsdistill.errors import InvalidSetting
from dsdistill.experts.progress import Progress, forget
from dsdistill.experts.shelf import reserved_folder
from dsdistill.generative.bound import variance_bound
from dsdistill.generative.denoiser import Denoiser
from dsdistill.generative.growing import Budget, Noised, follow, repeated
from dsdistill.generative.method import Drawing
from dsdistill.generative.models import identity_of_latents
from dsdistill.generative.sampling import DIT
from dsdistill.networks import parameter_digest

TUNED_AS = 2
"""Counts the ways in which versions of this package tuned; part of what a phase is kept under."""


@dataclass(frozen=True, kw_only=True)
class Minimax(Drawing):
    """Fine-tuning for sets: a diffusion model that draws what is representative, and unlike what it drew."""

    paper: ClassVar[str] = (
        "Gu et al., Efficient Dataset Distillation via Minimax Diffusion, CVPR 2024, arXiv 2311.15529"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "dit": Preset(
            "authors' code, DiT-XL/2 at 256 pixels, ten classes",
            {"sampler": DIT},
        ),
    }

    iterations: Annotated[int, Ge(1)] = 12_000
    """Steps of fine-tuning."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Latents of a mini-batch."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Step size of AdamW, constant."""
    representative: Annotated[float, Ge(0)] = 0.002
    """λ_r, weight of the least likeness to real latents."""
    diverse: Annotated[float, Ge(0)] = 0.008
    """λ_d, weight of the greatest likeness to earlier predictions."""
    memory: Annotated[int, Ge(1)] = 64
    """Latents that each memory holds; the oldest give way."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.9999
    """Of the moving average of the weights that images are drawn with; after 12,000 steps 30 % of it are as before."""
    weighted: bool = False
    """Weight both terms by ᾱ_t: where there is nearly noise alone, x̂0 says little."""
    classes_at_once: Annotated[int, Ge(1)] = 20
    """Classes that are fine-tuned for together, from the weights as they were; more have phases of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < self.batch_size:
            told = f"at least batch_size, {self.batch_size}: one mini-batch may be of one class"
            raise InvalidSetting("Minimax.memory", self.memory, told)

    def denoiser(self, run: Run) -> Denoiser:
        return self._phase(run, run.classes[0] // self.classes_at_once)

    def images(self, run: Run, classes: Tensor, places: Tensor, turn: int = 0) -> Tensor:
        """As `Drawing.images`, phase by phase."""
        phases = classes // self.classes_at_once
        made = torch.empty((len(classes), *run.source.shape), device=run.device)
        for phase in sorted(set(phases.tolist())):
            own = phases == phase
            scoped = replace(run, classes=(phase * self.classes_at_once,))
            made[own.to(run.device)] = super().images(scoped, classes[own], places[own], turn)
        return made

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        for phase in range(-(-run.source.num_classes // self.classes_at_once)):
            self._phase(run, phase)

    def _phase(self, run: Run, phase: int) -> Denoiser:
        """The denoiser that is fine-tuned for the classes of a phase; one network serves all of them in turn."""
        known = _tuned.setdefault(run.shared, {})
        if self not in known:
            known[self] = _Tuned(copy.deepcopy(self.model(run).denoiser))
        state = known[self]
        if state.phase != phase:
            digest = self._identity(run, phase)
            with reserved_steps(run, digest) as folder:
                kept = run.shared.get(f"minimax-{digest}", lambda: self._learned(run, phase, state.network, folder))
                if folder is not None:
                    forget(folder)  # now that its result is kept
            restored(state.network, kept)
            state.network.eval().requires_grad_(False)
            state.phase = phase
        return state.network

    def _identity(self, run: Run, phase: int) -> str:
        """Of all that decides what a phase learns."""
        model, shared = self.model(run), {field.name for field in fields(Drawing)}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shared}
        told: dict[str, Any] = {"version": TUNED_AS, "settings": own, "phase": phase, "seed": run.rng.seed}
        told |= {"latents": identity_of_latents(run, self.models), "denoiser": model.denoiser.digest}
        if self.fusion is not None:
            told["fusion"] = parameter_digest(self.fused(run).fusion)
        return settings_digest(told)

    def _learned(self, run: Run, phase: int, model: Denoiser, folder: Path | None = None) -> dict[str, Tensor]:
        """The moving average of what is trained, by name, from the weights as they were; ``folder`` keeps the steps."""
        first = phase * self.classes_at_once
        some = range(first, min(first + self.classes_at_once, run.source.num_classes))
        parts = [self.latents(run, label, mirrored=True) for label in some]
        latents, sizes = torch.cat(parts), torch.tensor([len(part) for part in parts])
        classes = torch.arange(first, some.stop).repeat_interleave(sizes).to(run.device)
        restored(model, tunable(self.model(run).denoiser))
        trained = tunable(model)
        for parameter in trained.values():
            parameter.requires_grad_()
        weights = nn.ParameterList(trained.values())
        average = copy.deepcopy(weights).requires_grad_(False)
        optimizer = torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0, **replayable(run.device))
        memories = Memories(some, self.memory, latents[0].numel(), run.device)
        rng = Rng(run.rng.seed, device=run.device).within("minimax", phase)

        def update(*drawn: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = self._loss(model, memories, Noised(*drawn))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            follow(average, weights, self.decay)
            return loss.detach()

        replayed = Replayed(update, run.device)

        def step(number: int) -> Tensor:
            generator = rng.at("step", number, device=run.device)
            return replayed(*Noised.drawn(latents[None], classes, self.batch_size, model.schedule.times, generator))

        model.train()
        state = nn.ModuleDict({"weights": weights, "average": average, "memories": memories})
        kept = Progress(folder, state, optimizer)
        repeated(run, "minimax", Budget(self.iterations), kept, step, mend="lower lr")
        return {name: parameter.detach().cpu() for name, parameter in zip(trained, average, strict=True)}

    def _loss(self, model: Denoiser, memories: "Memories", seen: Noised) -> Tensor:
        schedule, (clean, noise, times, own, drop) = model.schedule, seen
        noisy = schedule.noisy(clean, noise, times)
        raw = model.predicted(noisy, times, own, drop)
        found = raw[:, : clean.shape[1]]
        predicted = schedule.clean(found, noisy, times)[0].flatten(1)
        weight = schedule.at(times, clean).flatten() if self.weighted else torch.ones_like(predicted[:, 0])
        real, drawn = memories.terms(predicted, own, weight)
        memories.add(clean.flatten(1), predicted.detach(), own)
        loss: Tensor = mse_loss(found, schedule.target(clean, noise, times))
        if raw.shape[1] > found.shape[1]:
            loss = loss + variance_bound(schedule, raw, clean, noisy, times)
        return loss + self.representative * real + self.diverse * drawn


class Memories(nn.Module):
    """The real latents and the predictions that each of some classes had last, as directions.

    Args:
        classes: which, one after the other.
        size: of each memory.
        numbers: of a latent.
    """

    real: Tensor
    drawn: Tensor
    count: Tensor

    def __init__(self, classes: range, size: int, numbers: int, device: torch.device) -> None:
        super().__init__()
        self.first = classes.start
        for name in ("real", "drawn"):
            self.register_buffer(name, torch.zeros(len(classes), size, numbers, device=device))
        self.register_buffer("count", torch.zeros(len(classes), dtype=torch.int64, device=device))

    def terms(self, predicted: Tensor, classes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the classes of a batch of 1 − the least cosine to real ones, and of the greatest to drawn ones.

        Args:
            predicted: (B, d); differentiable.
            classes: (B,).
            weight: (B,), of each prediction's distance and likeness.
        """
        directions = normalize(predicted, dim=1)
        size = self.real.shape[1]
        classes = classes - self.first
        there = torch.arange(size, device=predicted.device) < self.count[classes][:, None].clamp_max(size)
        known, blank = there[:, 0], torch.zeros((), device=predicted.device)
        unlike = 1 - torch.einsum("bd,bmd->bm", directions, self.real[classes])
        like = torch.einsum("bd,bmd->bm", directions, self.drawn[classes])
        farthest = unlike.masked_fill(~there, -torch.inf).amax(1).where(known, blank) * weight
        nearest = like.masked_fill(~there, -torch.inf).amax(1).where(known, blank) * weight
        present = classes[:, None] == classes
        groups = present.float().sum(1).reciprocal().sum()  # n_b
        totals = []
        for values in (farthest, nearest):
            # Of each class the largest; each of its members has it, and counts as its share of one.
            largest = values.expand(len(values), -1).masked_fill(~present, -torch.inf).amax(1)
            totals.append((largest / present.float().sum(1)).sum() / groups)
        return totals[0], totals[1]

    @torch.no_grad()
    def add(self, real: Tensor, drawn: Tensor, classes: Tensor) -> None:
        """Remember latents (B, d) of classes (B,), in the place of the oldest."""
        classes = classes - self.first
        before = (classes[:, None] == classes).tril(-1).sum(1)
        slots = (self.count[classes] + before) % self.real.shape[1]
        self.real[classes, slots] = normalize(real, dim=1)
        self.drawn[classes, slots] = normalize(drawn, dim=1)
        self.count.index_add_(0, classes, torch.ones_like(classes))


def tunable(model: Denoiser) -> dict[str, nn.Parameter]:
    """Biases and class tables, by name, which alone are trained."""
    named = model.named_parameters()
    return {name: one for name, one in named if name.endswith((".bias", "embedding_table.weight"))}


@torch.no_grad()
def restored(model: Denoiser, kept: Mapping[str, Tensor]) -> None:
    """Put tensors back by name."""
    for name, parameter in tunable(model).items():
        parameter.copy_(kept[name])


@contextmanager
def reserved_steps(run: Run, digest: str) -> Iterator[Path | None]:
    """The folder that keeps the steps of a phase until it is done, from all other runs; None to keep none."""
    if run.store is None or run.shared.rehearsal is not None:
        yield None
        return
    folder = run.store / "minimax" / digest
    with reserved_folder(folder, run.shared.give_way, "this phase", storage.STORE):
        yield folder / "steps"


@dataclass
class _Tuned:
    """A network and the phase whose weights it has."""

    network: Denoiser
    phase: int | None = None


_tuned: "WeakKeyDictionary[Shared, dict[Minimax, _Tuned]]" = WeakKeyDictionary()
