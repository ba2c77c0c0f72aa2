"""The fusion that a run uses: found in the store, or trained on the latents of its images.

::

    STORE/fusion/DIGEST/     by images, autoencoder, names, settings and text states: runs with other seeds share it
"""

import hashlib
import logging
import time
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm import tqdm

from dsdistill.core import storage
from dsdistill.core.config import settings_digest, to_dict
from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared
from dsdistill.errors import Stopped
from dsdistill.experts.shelf import reserved_folder
from dsdistill.generative.fusing import Trained, Watch, train_fusion
from dsdistill.generative.fusion import Fusion
from dsdistill.generative.models import Models, identity_of_latents, latents_of, model_of
from dsdistill.generative.text import TextStates, clip_states, prompts_of

logger = logging.getLogger("dsdistill")
STORED_AS = 1
"""Counts the ways in which fusions were trained by versions of this package; part of their digest."""
_REHEARSED = 3  # steps that are timed


def fused_by(run: Run, models: Models, settings: Fusion) -> Trained:
    """The fusion of a run: found or trained at the first call.

    Raises:
        MissingWeights, MissingExtra: its text encoder cannot be had.
        Stopped: the run was asked to stop.
    """
    known = _known.setdefault(run.shared, {})
    if (models, settings) not in known:
        texts = _texts(run, settings)
        told = {
            "version": STORED_AS,
            "latents": identity_of_latents(run, models),
            "classes": list(run.source.classes),
            "fusion": to_dict(replace(settings, download=False)),
            "seed": models.seed,
            "texts": None if texts is None else digest_of(texts),
        }
        digest = settings_digest(told)

        def make() -> dict[str, Tensor]:
            return _trained(run, models, settings, texts).state()

        if run.store is None or run.shared.rehearsal is not None:
            kept = run.shared.get(f"fusion-{digest}", make)
        else:
            folder = run.store / "fusion" / digest
            with reserved_folder(folder, run.shared.give_way, "this fusion", storage.STORE):
                kept = Shared(folder, run.shared.give_way).get("fusion", make)
        grid = model_of(run, models).autoencoder.latent
        known[models, settings] = Trained.restore(kept, grid, settings, run.device)
    return known[models, settings]


def digest_of(texts: TextStates) -> str:
    """sha256 of the states."""
    return hashlib.sha256(texts.states.cpu().numpy().tobytes()).hexdigest()


def _texts(run: Run, settings: Fusion) -> TextStates | None:
    """States by the encoder that is named; None where one is trained."""
    if settings.text is None:
        return None
    prompts = prompts_of(run.source.classes, settings.template)
    options = {"revision": settings.revision, "download": settings.download}
    return clip_states(settings.text, prompts, **options, device=run.device)  # type: ignore[arg-type]


def _trained(run: Run, models: Models, settings: Fusion, texts: TextStates | None) -> Trained:
    latents, source, rehearsal = latents_of(run, models), run.source, run.shared.rehearsal
    rng = Rng(models.seed, device=run.device).within("fusion")
    grid = model_of(run, models).autoencoder.latent

    def fetch(rows: Tensor, generator: torch.Generator) -> Tensor:
        sides = torch.randint(len(latents), (len(rows),), generator=generator, device=latents.device)
        return latents[sides, rows.to(latents.device)]

    def train(steps: int, watch: Watch) -> Trained:
        own = replace(settings, steps=steps)
        return train_fusion(fetch, source.targets, source.classes, grid, own, rng, run.device, texts=texts, watch=watch)

    if rehearsal is not None and settings.steps > _REHEARSED:
        begin = time.perf_counter()
        made = train(_REHEARSED, lambda step, metrics: None)
        rehearsal.seconds += (time.perf_counter() - begin) / _REHEARSED * (settings.steps - _REHEARSED)
        return made
    logger.info("training the fusion, %d steps", settings.steps)
    with tqdm(total=settings.steps, desc="the fusion", unit="step", disable=None) as bar:

        def watch(step: int, metrics: dict[str, Tensor]) -> None:
            bar.update(1)
            run.shared.give_way()

        try:
            made = train(settings.steps, watch)
        except Stopped as error:
            kept = "part of the training of the fusion, which begins anew"
            raise Stopped(error.signum, error.iteration, error.path, kept) from None
    if rehearsal is None:
        told = ", ".join(f"{name} {first:.3f} to {last:.3f}" for name, (first, last) in made.losses.items())
        logger.info("the fusion has learned: %s", told)
    return made


_known: "WeakKeyDictionary[Shared, dict[tuple[Models, Fusion], Trained]]" = WeakKeyDictionary()
