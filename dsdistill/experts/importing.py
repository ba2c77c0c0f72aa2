"""Teachers made of weights that are there already: a file of one's own, or what torchvision and timm publish."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsdistill.core.config import require_instance
from dsdistill.core.device import resolve_device
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts.schooling import require_classes, teacher_name, teacher_spec
from dsdistill.experts.teacher import Teacher, filled, read_weights, recognised
from dsdistill.networks import NetworkSpec, has_batchnorm


def import_teacher(
    spec: NetworkSpec | str,
    weights: str | Path | Mapping[str, Tensor],
    source: ImageSource,
    *,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> Teacher:
    """A teacher made of weights that were trained elsewhere, after a look at what they make of the training images.

    Args:
        spec: what the network is, or its name, as for `train_teachers`.
        weights: a safetensors file; "library" for those that torchvision or timm publish (downloaded once); or tensors
            by name.
        source: real images, standardised as the weights expect them, its classes in the order of their logits.
        name: what to call it; None for its network's name.
        device: where its network shall live.

    Raises:
        BadArtifact: the file cannot be read.
        InvalidSetting: the weights are not those of such a network, or it has no batch normalisation.
        BadData: there is a single class, or it recognises the images hardly better than chance: mostly another order of
            the classes, or another standardisation.
    """
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    resolved = resolve_device(device)
    require_classes(source)
    spec = teacher_spec(spec, source.shape) if isinstance(spec, str) else spec
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
