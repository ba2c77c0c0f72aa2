"""Teachers trained ahead of the runs that use them, by a named recipe, and what that costs.

"Squeeze" is SRe2L's word (Yin et al., arXiv 2306.13092) for training them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsdistill.augmentations import PadCrop, ResizedCrop
from dsdistill.core import storage
from dsdistill.core.config import require_instance, whole_number
from dsdistill.core.device import default_chunk, resolve_device, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.core.units import shown_duration, shown_size
from dsdistill.data import ImageSource
from dsdistill.engine import Rehearsal, Run, Shared
from dsdistill.engine.observe import StopRequest
from dsdistill.errors import InvalidSetting, OutputConflict, Stopped, UnknownName
from dsdistill.experts.committee import ORDER, SQUEEZE, Committee, trained_order
from dsdistill.experts.schooling import require_classes, schooled, teacher_name, teacher_spec
from dsdistill.experts.teacher import MANIFEST, Teacher
from dsdistill.networks import NetworkSpec, has_batchnorm
from dsdistill.training import TrainingRecipe

logger = logging.getLogger("dsdistill")
RECIPES: Mapping[str, TrainingRecipe] = {
    # SRe2L's code, CIFAR-100: 78.7 % with ResNet-18.
    "sre2l_cifar": SQUEEZE,
    # SRe2L's and CDA's code, Tiny-ImageNet: 59.6 % with ResNet-18. Longer training makes recovery harder.
    "sre2l_tiny": TrainingRecipe(
        epochs=50,
        batch_size=256,
        lr=0.2,
        weight_decay=1e-4,
        schedule="cosine",
        warmup=5,
        augmentation=ResizedCrop(),
    ),
    # CV-DD's code, CIFAR-10 and CIFAR-100, all networks.
    "cvdd_cifar": TrainingRecipe(
        epochs=200,
        batch_size=512,
        optimizer="adam",
        lr=1e-3,
        weight_decay=1e-4,
        schedule="cosine",
        augmentation=PadCrop(),
    ),
    # CV-DD's code, Tiny-ImageNet, all networks.
    "cvdd_tiny": TrainingRecipe(
        epochs=50, batch_size=128, lr=0.01, weight_decay=1e-4, schedule="cosine", augmentation=PadCrop()
    ),
    # CV-DD's code, ImageNette, all networks; there the cosine has a period of 100 epochs, so lr comes up again.
    "cvdd_imagenette": TrainingRecipe(
        epochs=300, batch_size=64, lr=0.01, weight_decay=1e-4, schedule="cosine", augmentation=ResizedCrop()
    ),
}
"""Published recipes by name; README of the decoupled methods tells where from."""


def get_recipe(name: str) -> TrainingRecipe:
    """A recipe of `RECIPES`.

    Raises:
        UnknownName: with the nearest known name.
    """
    if name not in RECIPES:
        raise UnknownName("recipe of teachers", name, RECIPES)
    return RECIPES[name]


@dataclass(frozen=True)
class TeachersEstimate:
    """Cost of teachers that are not there yet.

    ``names`` of the committee; ``seconds`` of training, and ``disk``, the bytes that it adds to ``folder``, of which
    ``free_disk`` are free.
    """

    names: tuple[str, ...]
    epochs: int
    device: str
    seconds: float
    disk: int
    free_disk: int
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self) | {"names": list(self.names)}

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{', '.join(self.names)}, {self.epochs} epochs on {self.device}, beyond what is in {self.folder}:",
                f"  time    {shown_duration(self.seconds)}",
                f"  disk    {shown_size(self.disk)} of {shown_size(self.free_disk)} free",
            )
        )


def train_teachers(
    source: ImageSource,
    networks: Sequence[NetworkSpec | str],
    out: str | Path,
    training: TrainingRecipe | str = SQUEEZE,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    chunk: int | None = None,
    progress: bool = True,
) -> Committee:
    """Train a committee into ``out``, a folder for each member; the same call again continues, or finds it.

    Args:
        source: real images; only the training split is used.
        networks: what the members are, each with batch normalisation; a name stands for the network with that, and for
            one of torchvision up to 64 pixels with a stem for small images.
        out: folder of the committee, for `Committee.load` and ``teachers.folder`` of methods.
        training: how they are trained, or the name of a recipe.
        seed: of their training.
        device: "cpu", "cuda", "cuda:1", "mps", or None for the best one present.
        chunk: images that pass a network at once, None for a size that suits device and image.
        progress: show a bar where standard error is a terminal.

    Raises:
        InvalidSetting, UnknownName, DeviceUnavailable, OutputConflict: before any work starts.
        BadData: there is a single class. OutputConflict: a member's folder holds a teacher of something else.
        InvalidSetting: a member stopped being finite. Stopped: a signal ended it, finished epochs are kept.
        OutOfSpace: the disk is full.
    """
    stop = StopRequest(active=True)

    def give_way() -> None:
        if stop.signum is not None:
            raise Stopped(stop.signum, 0, Path(out))

    plan = _planned(source, networks, training, Shared(give_way=give_way), seed, device, chunk)
    if source.normalization.zca is not None:
        logger.warning("the images are whitened: methods that recover images from teachers will refuse these")
    folder = Path(out)
    storage.ensure_writable(folder)
    storage.write_json(folder / ORDER, list(dict.fromkeys([*trained_order(folder), *plan.members])))
    with stop:
        return Committee(
            [
                schooled(plan.run, spec, plan.recipe, seed, folder / name, progress=progress)
                for name, spec in plan.members.items()
            ]
        )


def keep_teacher(teacher: Teacher, out: str | Path) -> Teacher:
    """Put a teacher into the folder of a committee, at its end; the same one that is there stays, prior and all.

    Raises:
        OutputConflict: another teacher of that name is there, or the folder cannot be written.
        OutOfSpace: the disk is full.
    """
    folder = Path(out) / teacher.name
    if (folder / MANIFEST).exists():
        there = Teacher.load(folder, network=teacher.spec)
        if there.digest != teacher.digest:
            raise OutputConflict(folder, "holds another teacher of that name; choose another folder, or remove it")
        return there
    storage.ensure_writable(Path(out))
    teacher.save(folder)
    storage.write_json(Path(out) / ORDER, list(dict.fromkeys([*trained_order(Path(out)), teacher.name])))
    return teacher


def estimate_teachers(
    source: ImageSource,
    networks: Sequence[NetworkSpec | str],
    out: str | Path,
    training: TrainingRecipe | str = SQUEEZE,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    chunk: int | None = None,
) -> TeachersEstimate:
    """Say what `train_teachers` will cost, by a few steps on this machine; nothing is written.

    Arguments, and errors before any work, as there.
    """
    rehearsal = Rehearsal()
    plan = _planned(source, networks, training, Shared(rehearsal=rehearsal), seed, device, chunk)
    for name, spec in plan.members.items():
        schooled(plan.run, spec, plan.recipe, seed, Path(out) / name)
    return TeachersEstimate(
        names=tuple(plan.members),
        epochs=plan.recipe.epochs,
        device=plan.run.device.type,
        seconds=rehearsal.seconds,
        disk=rehearsal.stored,
        free_disk=storage.free_space(Path(out)),
        folder=str(out),
    )


@dataclass(frozen=True)
class _Plan:
    """What is to be trained, by name, and how."""

    run: Run
    members: Mapping[str, NetworkSpec]
    recipe: TrainingRecipe


def _planned(
    source: ImageSource,
    networks: Sequence[NetworkSpec | str],
    training: TrainingRecipe | str,
    shared: Shared,
    seed: int,
    device: str | torch.device | None,
    chunk: int | None,
) -> _Plan:
    """After every check that needs no work; errors as in `train_teachers`."""
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    recipe = get_recipe(training) if isinstance(training, str) else training
    several = [networks] if isinstance(networks, (str, NetworkSpec)) else networks
    specs = [teacher_spec(one, source.shape) if isinstance(one, str) else one for one in several]
    members = {teacher_name(spec): spec for spec in specs}
    if not members or len(members) < len(specs):
        raise InvalidSetting("networks", [teacher_name(spec) for spec in specs], "at least one network, each once")
    resolved = resolve_device(device)
    require_classes(source)
    for spec in specs:
        spec.require((), source.shape, source.num_classes)
        blank = spec.build(source.shape, source.num_classes, generator=torch.Generator().manual_seed(0), device="cpu")
        if not has_batchnorm(blank):
            raise InvalidSetting("networks", spec.name, "a teacher needs batch normalisation: choose another network")
    settle_allocator(resolved)
    run = Run(
        source=source.train_only().to(resolved),
        device=resolved,
        rng=Rng(seed, device=resolved),
        classes=tuple(range(source.num_classes)),
        chunk=default_chunk(source.shape, resolved) if chunk is None else whole_number("chunk", chunk, 1),
        shared=shared,
    )
    return _Plan(run, members, recipe)
