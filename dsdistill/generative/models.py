"""The models that a run draws with: an autoencoder and a denoiser, loaded, or trained on its images alone.

::

    STORE/generative/DIGEST/generative.json, weights.safetensors   trained ones, found by every run on the same images
    STORE/generative/DIGEST/autoencoder/, denoiser/                their training, until it is finished
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from dsdistill.core import storage
from dsdistill.core.config import settings_digest, to_dict, validate
from dsdistill.core.device import default_chunk, synchronize
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, Shared
from dsdistill.errors import BadArtifact, InvalidSetting, Stopped
from dsdistill.experts.progress import forget
from dsdistill.experts.shelf import reserved_folder
from dsdistill.generative.autoencoder import MOST_COMPONENTS, Autoencoder, PatchPCA, halvings, small_kl
from dsdistill.generative.denoiser import Denoiser, small_transformer, tokens_of
from dsdistill.generative.frames import Frame
from dsdistill.generative.growing import SIZES, grow_autoencoder, grow_denoiser
from dsdistill.generative.pretrained import Weights, check_weights, load_weights
from dsdistill.networks import parameter_digest
from dsdistill.recipe import library_versions

logger = logging.getLogger("dsdistill")
STORED_AS = 1
"""Counts the ways in which models were trained by versions of this package; part of their digest."""
MANIFEST, WEIGHTS = "generative.json", "weights.safetensors"
_FITTED = 20_000  # images that a closed-form autoencoder is fitted on, at most


@dataclass(frozen=True, kw_only=True)
class Models:
    """Which autoencoder and denoiser a method draws with: pretrained ones, or small ones, trained on the real images.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    weights: Weights | None = None
    """Pretrained models; null: they are trained on the real images."""
    size: Literal["nano", "small", "base"] = "nano"
    """nano suits a CPU and small images, small and base want a GPU."""
    samples: Annotated[int, Ge(1)] | None = None
    """Latents that the denoiser sees while it is trained; null: 60,000 (nano), 30.7 million (small), 51.2 (base)."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """The denoiser's training ends after so long, counted anew where it was interrupted; notes say what it saw."""
    seed: int = 0
    """Of their training, and of a fusion's, whatever the seed of the run is: runs with other seeds share them."""

    def __post_init__(self) -> None:
        validate(self)
        given = [name for name in ("size", "samples", "max_seconds") if getattr(self, name) != getattr(Models, name)]
        if self.weights is not None and given:
            told = "left out: pretrained models are not trained"
            raise InvalidSetting(f"Models.{given[0]}", getattr(self, given[0]), told)

    def check(self, source: ImageSource) -> None:
        """Look for pretrained models before anything is made.

        Raises:
            MissingWeights: they are not there. BadData: they do not know a class of the images.
        """
        if self.weights is not None:
            check_weights(self.weights, source)


@dataclass(frozen=True, eq=False)
class LatentModel:
    """An autoencoder, a denoiser of its latents, and how images become what it takes.

    Attributes:
        frame: between images and squares.
        autoencoder, denoiser: on the run's device, fixed.
        told: where they come from, for the notes of a set.
    """

    frame: Frame
    autoencoder: Autoencoder
    denoiser: Denoiser
    told: tuple[str, ...]

    @torch.no_grad()
    def encoded(self, images: Tensor) -> Tensor:
        """Unscaled latents (B, c, g, g) of standardised images (B, C, H, W)."""
        return self.autoencoder.encode(self.frame.squares(images)).float()

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Standardised images (B, C, H, W) of scaled latents, their pixels within [0, 1]."""
        return self.frame.restored(self.autoencoder.decode(latents / self.autoencoder.scale))

    def chunk(self, run: Run) -> int:
        """How many images pass the models at a time: fewer than the run's where they are drawn larger."""
        return min(run.chunk, default_chunk((self.frame.channels, self.frame.side, self.frame.side), run.device))

    @property
    def digest(self) -> str:
        """sha256 of the autoencoder, which latents depend on."""
        return parameter_digest(self.autoencoder)


def model_of(run: Run, models: Models) -> LatentModel:
    """The models of a run: loaded, found or trained at the first call.

    Raises:
        BadArtifact: trained ones are damaged.
        MissingWeights, MissingExtra: pretrained ones cannot be had.
        BadData, InvalidSetting: they do not fit the images.
        Stopped: the run was asked to stop; the training so far is kept.
    """
    made = _made.setdefault(run.shared, {})
    if models not in made:
        made[models] = _trained(run, models) if models.weights is None else _loaded(run, models.weights)
    return made[models]


def latents_of(run: Run, models: Models) -> Tensor:
    """Unscaled latents (F, N, c, g, g) of all real images, and where mirroring is safe of mirrored ones (F = 2).

    They are made once, and kept in the run's store by what decides them.
    """
    known = _latents.setdefault(run.shared, {})
    if models not in known:
        model = model_of(run, models)
        place = None if run.store is None else run.store / "latents" / settings_digest(identity_of_latents(run, models))
        known[models] = _kept_latents(run, model, place)
    return known[models]


def identity_of_latents(run: Run, models: Models) -> dict[str, Any]:
    """All that decides them."""
    model = model_of(run, models)
    return {**_images(run.source), "autoencoder": model.digest, "side": model.frame.side}


def _kept_latents(run: Run, model: LatentModel, place: Path | None) -> Tensor:
    name = "latents.safetensors"
    if place is not None and (place / "latents.json").exists():
        try:
            manifest = storage.read_manifest(place / "latents.json")
            found: Tensor = storage.read_listed_tensors(place, manifest, name)["latents"]
            return found.to(run.device)
        except BadArtifact as error:
            logger.warning("the latents are made again: %s", error)
    made = _encoded(run, model)
    if place is not None and run.shared.rehearsal is None:
        storage.ensure_writable(place, "a store")
        files = {name: storage.encode_tensors({"latents": made.cpu()})}
        storage.write_folder(place, files, "latents.json", {"source": run.source.name})
    return made


def _encoded(run: Run, model: LatentModel) -> Tensor:
    """Latents of all images, see `latents_of`; in a rehearsal those of the first ones stand for all."""
    rehearsal, source = run.shared.rehearsal, run.source
    sides = (False, True) if source.mirror_safe else (False,)
    every = torch.split(torch.arange(len(source), device=run.device), model.chunk(run))
    made: Tensor | None = None
    for side, mirrored in enumerate(sides):
        for rows in every:
            run.shared.give_way()
            images = source.gather(rows)
            begin = time.perf_counter()
            found = model.encoded(images.flip(3) if mirrored else images)
            if rehearsal is not None:
                synchronize(run.device)
                rehearsal.seconds += (time.perf_counter() - begin) * (len(sides) * len(every) - 1)
                again = torch.arange(len(source), device=run.device) % len(found)
                return found[again].expand(len(sides), -1, -1, -1, -1).clone()
            if made is None:
                made = found.new_empty((len(sides), len(source), *found.shape[1:]))
            made[side, rows] = found
    assert made is not None
    return made


def _loaded(run: Run, weights: Weights) -> LatentModel:
    found = load_weights(weights, run.source)
    frame = Frame(run.source.shape, run.source.normalization, found.side, found.autoencoder.channels, resize=True)
    logger.info("%s", found.told)
    return _fixed(run, LatentModel(frame, found.autoencoder, found.denoiser, (found.told,)))


def _trained(run: Run, models: Models) -> LatentModel:
    identity = _identity(run.source, models)
    digest = settings_digest(identity)
    folder = None if run.store is None else run.store / "generative" / digest
    if folder is None or run.shared.rehearsal is not None:
        found = None if folder is None else _found(run, models, folder)
        return found or _grown(run, models, None)
    found = _found(run, models, folder)
    if found is None:
        with reserved_folder(folder, run.shared.give_way, "these models"):
            found = _found(run, models, folder)  # asked again: who held the lock may have made them
            if found is None:
                try:
                    found = _grown(run, models, folder)
                except Stopped as error:
                    kept = f"part of the training of the models, kept in {folder}"
                    raise Stopped(error.signum, error.iteration, error.path, kept) from None
                _save(found, folder, identity)
    return found


def _identity(source: ImageSource, models: Models) -> dict[str, Any]:
    return {
        "version": STORED_AS,
        "models": to_dict(models),
        "size": asdict(SIZES[models.size]),
        "images": _images(source),
    }


def _images(source: ImageSource) -> dict[str, Any]:
    return {
        "fingerprint": source.fingerprint,
        "normalization": source.normalization.identity(),
        "mirror_safe": source.mirror_safe,
    }


def _save(model: LatentModel, folder: Path, identity: dict[str, Any]) -> None:
    tensors = _both(model).state_dict()
    told = {
        "format": "dsdistill.generative",
        "schema_version": 1,
        "identity": identity,
        "latent": list(model.autoencoder.latent),
        "told": list(model.told),
        "versions": library_versions(),
    }
    storage.write_folder(folder, {WEIGHTS: storage.encode_tensors(tensors)}, MANIFEST, told)
    for name in ("autoencoder", "denoiser"):
        forget(folder / name)


def _found(run: Run, models: Models, folder: Path) -> LatentModel | None:
    if not (folder / MANIFEST).exists():
        return None
    mend = f"remove {folder}, and they are trained again"
    try:
        manifest = storage.read_manifest(folder / MANIFEST)
        tensors = storage.read_listed_tensors(folder, manifest, WEIGHTS)
    except BadArtifact as error:
        raise BadArtifact(
            folder, f"holds damaged models ({str(error).removesuffix('; get a fresh copy')}): {mend}"
        ) from error
    try:
        channels, grid, _ = map(int, manifest["latent"])
        frame = frame_of(run.source, models)
        if SIZES[models.size].pca:
            autoencoder: Autoencoder = PatchPCA(frame.channels, frame.side, frame.side // grid, channels)
        else:
            autoencoder = small_kl(frame.channels, frame.side, halvings(max(run.source.shape[1:])), Rng(models.seed))
        denoiser = _blank_denoiser(run, models, autoencoder)
        model = LatentModel(frame, autoencoder, denoiser, tuple(map(str, manifest["told"])))
        _both(model).load_state_dict(tensors)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadArtifact(folder / MANIFEST, f"does not describe models of these images ({error}): {mend}") from error
    return _fixed(run, model)


def _grown(run: Run, models: Models, folder: Path | None) -> LatentModel:
    size, rng = SIZES[models.size], Rng(models.seed, device=run.device).within("generative")
    frame, source = frame_of(run.source, models), run.source

    def fetch(rows: Tensor) -> Tensor:
        return frame.squares(source.gather(rows))

    if size.pca:
        generator = rng.at("fit", device=run.device)
        rows = torch.randperm(len(source), generator=generator, device=run.device)[:_FITTED]
        parts = [fetch(part).cpu() for part in torch.split(rows, run.chunk)]
        autoencoder: Autoencoder = PatchPCA.fitted(torch.cat(parts), patch_of(source.shape), MOST_COMPONENTS)
        autoencoder.to(run.device)
    else:
        model = small_kl(frame.channels, frame.side, halvings(max(source.shape[1:])), rng).to(run.device)
        place = None if folder is None else folder / "autoencoder"
        grow_autoencoder(run, model, fetch, len(source), size.images, rng, place)
        autoencoder = model
    blank = LatentModel(frame, autoencoder, _blank_denoiser(run, models, autoencoder), ())
    latents = _encoded(run, blank)
    seen = grow_denoiser(
        run,
        blank.denoiser,
        latents * autoencoder.scale,
        source.targets,
        size,
        models.samples or size.samples,
        models.max_seconds,
        rng,
        None if folder is None else folder / "denoiser",
    )
    if run.shared.rehearsal is not None:
        run.shared.rehearsal.stored += sum(tensor.nbytes for tensor in _both(blank).state_dict().values())
    told = (f"drawn by models of size {models.size} trained on these images alone, the denoiser on {seen:,} latents",)
    return _fixed(run, replace(blank, told=told))


def _blank_denoiser(run: Run, models: Models, autoencoder: Autoencoder) -> Denoiser:
    size, rng = SIZES[models.size], Rng(models.seed).within("generative")
    made = small_transformer(autoencoder.latent, run.source.num_classes, size.layers, size.heads, size.width, rng)
    return made.to(run.device)


def _both(model: LatentModel) -> nn.ModuleDict:
    return nn.ModuleDict({"autoencoder": model.autoencoder, "denoiser": model.denoiser})


def _fixed(run: Run, model: LatentModel) -> LatentModel:
    _both(model).to(run.device).eval().requires_grad_(False)
    return model


def frame_of(source: ImageSource, models: Models) -> Frame:
    """Squares that hold the images, as many pixels wide as autoencoder and denoiser can divide."""
    channels, height, width = source.shape
    longest = max(height, width)
    if SIZES[models.size].pca:
        patch = patch_of(source.shape)
        step = patch * tokens_of(-(-longest // patch))
    else:
        step = 2 * 2 ** halvings(longest)  # and patches of two pixels of the latent
    return Frame(source.shape, source.normalization, -(-longest // step) * step, channels)


def patch_of(shape: tuple[int, int, int]) -> int:
    """Side of the patches of a closed-form autoencoder: 4 from 24 pixels on, 2 from 6 on."""
    longest = max(shape[1:])
    return 4 if longest >= 24 else 2 if longest >= 6 else 1


_made: "WeakKeyDictionary[Shared, dict[Models, LatentModel]]" = WeakKeyDictionary()
_latents: "WeakKeyDictionary[Shared, dict[Models, Tensor]]" = WeakKeyDictionary()
