"""Teachers ahead of the runs that use them: trained by a named recipe, or made of weights that are there already.

"Squeeze" is SRe2L's word (Yin et al., arXiv 2306.13092) for training them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsdistill.augmentations import PadCrop, ResizedCrop
from dsdistill.core import storage
from dsdistill.core.config import require_instance, whole_number
from dsdistill.core.device import default_chunk, resolve_device, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, Shared
from dsdistill.engine.observe import StopRequest
from dsdistill.errors import BadData, InvalidSetting, Stopped, UnknownName
from dsdistill.experts.committee import ORDER, SQUEEZE, Committee, trained_order
from dsdistill.experts.schooling import schooled, teacher_name
from dsdistill.experts.teacher import Teacher, filled, read_weights, recognised
from dsdistill.networks import NetworkSpec, has_batchnorm
from dsdistill.training import TrainingRecipe

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


def train_teachers(
    source: ImageSource,
    networks: Sequence[NetworkSpec],
    out: str | Path,
    training: TrainingRecipe | str = SQUEEZE,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    chunk: int | None = None,
) -> Committee:
    """Train a committee into ``out``, a folder for each member; the same call again continues, or finds it.

    Args:
        source: real images; only the training split is used.
        networks: what the members are; each with batch normalisation.
        out: folder of the committee, for `Committee.load` and ``teachers.folder`` of methods.
        training: how they are trained, or the name of a recipe.
        seed: of their training.
        device: "cpu", "cuda", "cuda:1", "mps", or None for the best one present.
        chunk: images that pass a network at once, None for a size that suits device and image.

    Raises:
        InvalidSetting, UnknownName, DeviceUnavailable, OutputConflict: before any work starts.
        BadData: a member's folder holds a teacher of something else.
        InvalidSetting: a member stopped being finite. Stopped: a signal ended it, finished epochs are kept.
        OutOfSpace: the disk is full.
    """
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    recipe = get_recipe(training) if isinstance(training, str) else training
    names = [teacher_name(spec) for spec in networks]
    if not names or len(set(names)) < len(names):
        raise InvalidSetting("networks", names, "at least one network, each once")
    resolved = resolve_device(device)
    for spec in networks:
        spec.require((), source.shape, source.num_classes)
        blank = spec.build(source.shape, source.num_classes, generator=torch.Generator().manual_seed(0), device="cpu")
        if not has_batchnorm(blank):
            raise InvalidSetting("networks", spec.name, "a teacher needs batch normalisation: choose another network")
    settle_allocator(resolved)
    stop = StopRequest(active=True)

    def give_way() -> None:
        if stop.signum is not None:
            raise Stopped(stop.signum, 0, Path(out))

    run = Run(
        source=source.train_only().to(resolved),
        device=resolved,
        rng=Rng(seed, device=resolved),
        classes=tuple(range(source.num_classes)),
        chunk=default_chunk(source.shape, resolved) if chunk is None else whole_number("chunk", chunk, 1),
        shared=Shared(give_way=give_way),
    )
    storage.ensure_writable(Path(out))
    storage.write_json(Path(out) / ORDER, list(dict.fromkeys([*trained_order(Path(out)), *names])))
    with stop:
        return Committee(
            [schooled(run, spec, recipe, seed, Path(out) / name) for spec, name in zip(networks, names, strict=True)]
        )


def import_teacher(
    spec: NetworkSpec,
    weights: str | Path | Mapping[str, Tensor],
    source: ImageSource,
    *,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> Teacher:
    """A teacher made of weights that were trained elsewhere, after a look at what they make of the training images.

    Args:
        spec: what the network is.
        weights: a safetensors file; "library" for those that torchvision or timm publish (downloaded once); or tensors
            by name.
        source: real images, standardised as the weights expect them, its classes in the order of their logits.
        name: what to call it; None for its network's name.
        device: where its network shall live.

    Raises:
        BadArtifact: the file cannot be read.
        InvalidSetting: the weights are not those of such a network, or it has no batch normalisation.
        BadData: it recognises the images hardly better than chance: mostly another order of the classes, or another
            standardisation.
    """
    resolved = resolve_device(device)
    if isinstance(weights, Mapping):
        tensors = dict(weights)
    else:
        tensors = library_weights(spec) if str(weights) == "library" else read_weights(Path(weights))
    network = filled(spec, source.shape, source.num_classes, tensors, resolved)
    if not has_batchnorm(network):
        raise InvalidSetting("network", spec.name, "a teacher needs batch normalisation: choose norm='batch'")
    accuracy = recognised(network, source.to(resolved))
    chance = 1 / source.num_classes
    if accuracy < chance + 3 * math.sqrt(chance * (1 - chance) / min(1000, len(source))):
        raise BadData(
            f"{spec.name} with these weights recognises {100 * accuracy:.1f} % of the training images of "
            f"{source.name!r}, where guessing gives {100 * chance:.1f} %: the weights know the classes in another "
            "order, or pixels standardised in another way"
        )
    return Teacher(
        name=teacher_name(spec) if name is None else name,
        spec=spec,
        network=network,
        classes=source.classes,
        shape=source.shape,
        normalization=source.normalization,
        accuracy=accuracy,
        history={"source": source.name, "weights": "tensors" if isinstance(weights, Mapping) else str(weights)},
    )


def library_weights(spec: NetworkSpec) -> dict[str, Tensor]:
    """The weights that torchvision or timm publish for a model, downloaded on first use into the library's cache.

    Raises:
        InvalidSetting: the network is none of theirs, or has none; or they cannot be fetched.
    """
    library, _, model = spec.name.partition(":")
    try:
        if library == "torchvision" and spec.stem is None:
            from torchvision.models import get_model_weights

            best = get_model_weights(model).DEFAULT
            return dict(best.get_state_dict(progress=False, check_hash=True, weights_only=True))
        if library == "timm":
            import timm

            return dict(timm.create_model(model, pretrained=True).state_dict())
    except Exception as error:  # of the library, or of the network
        raise InvalidSetting("weights", "library", f"those of {spec.name} cannot be had: {error}") from error
    raise InvalidSetting("weights", "library", f"{spec.name} is no model of torchvision or timm with published weights")
