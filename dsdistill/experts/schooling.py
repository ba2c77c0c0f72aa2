"""Training a teacher on the real images of a run, resumably, and finding one that is there ("squeeze", SRe2L)."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsdistill.core.config import settings_digest, to_dict
from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.data import ImageSource
from dsdistill.engine import Run
from dsdistill.errors import BadData, InvalidSetting, OutputConflict, Stopped
from dsdistill.experts.progress import Progress, forget
from dsdistill.experts.shelf import reserved_folder
from dsdistill.experts.teacher import MANIFEST, Teacher, recognised
from dsdistill.experts.training import train_on_real
from dsdistill.networks import NetworkSpec, has_batchnorm
from dsdistill.recipe import library_versions
from dsdistill.training import TrainingRecipe, make_optimizer

logger = logging.getLogger("dsdistill")
STORED_AS = 1
"""Counts the ways in which teachers were trained by versions of this package; part of their digest."""
_PROGRESS = "progress"


def schooled(
    run: Run,
    spec: NetworkSpec,
    training: TrainingRecipe,
    seed: int = 0,
    folder: Path | None = None,
    *,
    progress: bool = False,
) -> Teacher:
    """A teacher for the images of a run: found, or trained now; an interrupted training goes on.

    Args:
        run: of the whole or of any job.
        spec: what it is.
        training: how it is trained.
        seed: of its training, whatever that of the run is.
        folder: where it is kept; None for a place in the run's store, or memory where the run has none.
        progress: show a bar where standard error is a terminal.

    Raises:
        InvalidSetting: the network has no batch normalisation, or stopped being finite while it was trained.
        OutputConflict: the folder holds a teacher of something else. BadArtifact: a damaged one.
        Stopped: the run was asked to stop; epochs that are behind it are kept.
        OutOfSpace: the disk is full.
    """
    identity = _identity(run.source, spec, training, seed)
    digest = settings_digest(identity)
    if folder is None and run.store is not None:
        folder = stored_at(run.store, digest)
    if folder is None or run.shared.rehearsal is not None:
        found = None if folder is None else _found(run, folder, digest)
        return found or _trained(run, spec, training, seed, identity, None, progress)
    found = _found(run, folder, digest)
    if found is None:
        with reserved_folder(folder, run.shared.give_way, "this teacher"):
            found = _found(run, folder, digest)  # asked again: who held the lock may have made it
            if found is None:
                try:
                    found = _trained(run, spec, training, seed, identity, folder, progress)
                except Stopped as error:
                    kept = f"whole epochs of the teacher {teacher_name(spec)}, kept in {folder}"
                    raise Stopped(error.signum, error.iteration, error.path, kept) from None
                found.save(folder)
                forget(folder / _PROGRESS)
    return found


def require_classes(source: ImageSource) -> None:
    """Refuse images of a single class.

    Raises:
        BadData: there is one.
    """
    if source.num_classes < 2:
        raise BadData(f"teachers tell classes apart, and {source.name!r} has one class: load data of several")


def teacher_name(spec: NetworkSpec) -> str:
    """What a teacher is called: its network, and what of it is not as usual."""
    options = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "name"}
    told = [f"{name}{value}" for name, value in options.items() if value not in (None, "batch", "small")]
    return "-".join([spec.name.replace(":", "-").replace(".", "-"), *told])


def teacher_spec(name: str, shape: tuple[int, int, int]) -> NetworkSpec:
    """The network of that name as a teacher: with batch normalisation, and a stem for the size of the images."""
    if name.startswith("torchvision:") and max(shape[1:]) <= 64:
        return NetworkSpec(name, stem="small")
    plain = NetworkSpec(name)
    return NetworkSpec(name, norm="batch") if ":" not in name and plain.has("norm") else plain


def teacher_folder(store: Path, source: ImageSource, spec: NetworkSpec, training: TrainingRecipe, seed: int) -> Path:
    """Where in a store runs on these images keep such a teacher."""
    return stored_at(store, settings_digest(_identity(source, spec, training, seed)))


def stored_at(store: Path, digest: str) -> Path:
    """Where in a store the teacher of that identity is."""
    return store / "teachers" / digest


def _identity(source: ImageSource, spec: NetworkSpec, training: TrainingRecipe, seed: int) -> dict[str, Any]:
    return {
        "version": STORED_AS,
        "network": to_dict(spec),
        "training": to_dict(training),
        "seed": seed,
        "images": {
            "fingerprint": source.fingerprint,
            "normalization": source.normalization.identity(),
            "mirror_safe": source.mirror_safe,
        },
    }


def _found(run: Run, folder: Path, digest: str) -> Teacher | None:
    if not (folder / MANIFEST).exists():
        return None
    teacher = Teacher.load(folder, run.device)
    if teacher.history.get("digest") != digest:
        raise OutputConflict(
            folder, f"holds the teacher {teacher.name!r} of other images or another training; choose another folder"
        )
    return teacher


def _trained(
    run: Run,
    spec: NetworkSpec,
    training: TrainingRecipe,
    seed: int,
    identity: Mapping[str, Any],
    folder: Path | None,
    progress: bool,
) -> Teacher:
    source, rng = run.source, Rng(seed, device=run.device).within("teacher")
    network = spec.build(source.shape, source.num_classes, generator=rng.at("network"), device=run.device)
    if not has_batchnorm(network):
        raise InvalidSetting("networks", spec.name, "a teacher needs batch normalisation: choose norm='batch'")
    optimizer = make_optimizer(dict(network.named_parameters()), training, run.device)
    kept = Progress(folder / _PROGRESS if folder else None, network, optimizer)
    begin = kept.read()
    if run.shared.rehearsal is None:
        behind = f", {begin} of them are done" if begin else ""
        logger.info("training the teacher %s: %d epochs%s", teacher_name(spec), training.epochs, behind)
    if begin < training.epochs:
        shown = progress and run.shared.rehearsal is None
        bar = tqdm(
            total=training.epochs,
            initial=begin,
            desc=teacher_name(spec),
            unit="epoch",
            disable=None if shown else True,
        )

        def after(epoch: int) -> None:
            kept.add(epoch)
            bar.update(epoch - bar.n)
            seed_global(rng.integer("global", epoch), run.device)

        # Dropout of library networks draws from the global generators.
        with bar, isolated_global_rng(run.device):
            seed_global(rng.integer("global", begin), run.device)
            try:
                train_on_real(run, network, training, rng, optimizer=optimizer, begin=begin, after=after)
            except BaseException:
                kept.write()
                raise
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise InvalidSetting("training.lr", training.lr, f"the teacher {teacher_name(spec)} diverged: lower it")
    if run.shared.rehearsal is not None:
        run.shared.rehearsal.stored += sum(tensor.nbytes for tensor in network.state_dict().values())
    network.eval()
    return Teacher(
        name=teacher_name(spec),
        spec=spec,
        network=network,
        classes=source.classes,
        shape=source.shape,
        normalization=source.normalization,
        accuracy=recognised(network, source),
        history={
            "digest": settings_digest(dict(identity)),
            "source": source.name,
            **identity,
            "versions": library_versions(),
        },
    )
