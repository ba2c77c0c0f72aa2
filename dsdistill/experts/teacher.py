"""A trained network with all that it takes to use it rightly: what it is, which classes in which order, which pixels.

::

    FOLDER/weights.safetensors         parameters and buffers, running statistics among them
    FOLDER/normalization.safetensors   where its pixels were whitened
    FOLDER/teacher.json                everything else, and the sha256 of the files; written last

Loading one runs no code of the folder's maker: its network is one of this package, of torchvision or timm, or one that
the caller names.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dsdistill.core import storage
from dsdistill.core.config import from_dict, to_dict
from dsdistill.core.device import default_chunk
from dsdistill.data import ImageSource, Normalization
from dsdistill.errors import BadArtifact, BadData, DistillError, InvalidSetting
from dsdistill.networks import NetworkSpec, parameter_digest
from dsdistill.networks.probe import evaluation_mode

MANIFEST, WEIGHTS, NORMALIZATION = "teacher.json", "weights.safetensors", "normalization.safetensors"
SCHEMA_VERSION = 1
_PROBED = 1000  # training images that it is asked about


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network, in evaluation mode, its parameters fixed.

    Args:
        name: unique in a committee; the name of its folder.
        spec: what the network is.
        network: the network.
        classes: names in the order of its logits.
        shape: (C, H, W) of one image.
        normalization: how the pixels that it knows are standardised.
        accuracy: share of training images (`recognised`) that it gets right, in [0, 1].
        performance: prior of CV-DD: accuracy, in percent, of networks trained on a set distilled with it alone.
        history: how it was trained, for the record.
    """

    name: str
    spec: NetworkSpec
    network: nn.Module = field(repr=False)
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    normalization: Normalization
    accuracy: float
    performance: float | None = None
    history: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """sha256 of its parameters and buffers."""
        return parameter_digest(self.network)

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters and buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.network.state_dict().values())

    def check(self, source: ImageSource) -> None:
        """Refuse images that it was not trained for; its accuracy on some of them is measured.

        Raises:
            BadData: other classes or another order of them, other shapes or another standardisation, or it recognises
                the images much worse than those that it was trained on.
        """
        title = f"teacher {self.name!r}"
        if self.classes != source.classes:
            same = set(self.classes) == set(source.classes)
            problem = "the same classes in another order" if same else "other classes"
            raise BadData(
                f"{title} was trained on {problem} than {source.name!r} has: {_short(self.classes)} and "
                f"{_short(source.classes)}; take teachers trained on this data"
            )
        if self.shape != source.shape:
            raise BadData(f"{title} takes images of shape {self.shape}, those of {source.name!r} are {source.shape}")
        if self.normalization.identity() != source.normalization.identity():
            raise BadData(
                f"{title} knows pixels standardised by {self.normalization}, those of {source.name!r} are by "
                f"{source.normalization}: load the data as it was loaded for the teacher"
            )
        right, chance = recognised(self.network, source), 1 / source.num_classes
        # Of a teacher that knows little, a few images tell little: what may be chance is let pass.
        noise = 3 * math.sqrt(self.accuracy * (1 - self.accuracy) / min(_PROBED, len(source)))
        if right < min(chance + (self.accuracy - chance) / 2, self.accuracy - noise):
            raise BadData(
                f"{title} recognises {100 * right:.1f} % of the training images of {source.name!r}, and "
                f"{100 * self.accuracy:.1f} % of those that it was trained on: the order of the classes, or the "
                "images, are not the same; train teachers on this data"
            )

    def save(self, folder: str | Path) -> Path:
        """Write it into a folder, made if needed; one that is there already is replaced.

        Raises:
            OutputConflict: the folder cannot be written. OutOfSpace: the disk is full.
        """
        folder = Path(folder)
        storage.ensure_writable(folder)
        files = {WEIGHTS: storage.encode_tensors(self.network.state_dict())}
        if tensors := self.normalization.tensors():
            files[NORMALIZATION] = storage.encode_tensors(tensors)
        storage.write_folder(folder, files, MANIFEST, self._manifest())
        return folder

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": "dsdistill.teacher",
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "network": to_dict(self.spec),
            "classes": list(self.classes),
            "shape": list(self.shape),
            "normalization": self.normalization.to_json(),
            "accuracy": self.accuracy,
            "performance": self.performance,
            "history": dict(self.history),
        }

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str = "cpu", network: NetworkSpec | None = None
    ) -> "Teacher":
        """Read one that `save` wrote, after checking every byte.

        Args:
            folder: with a ``teacher.json``.
            device: where its network shall live.
            network: what it is; needed where the folder names a factory of other code ("package.module:function"),
                which is never imported on a folder's word.

        Raises:
            BadArtifact: missing, damaged, from a newer version, or of another make than ``network``.
        """
        folder = Path(folder)
        manifest = storage.read_manifest(folder / MANIFEST)
        if manifest.get("format") != "dsdistill.teacher" or manifest.get("schema_version") != SCHEMA_VERSION:
            found = f"{manifest.get('format')!r} of version {manifest.get('schema_version')!r}"
            raise BadArtifact(folder / MANIFEST, f"is {found}, no teacher of version {SCHEMA_VERSION}")
        weights = storage.read_listed_tensors(folder, manifest, WEIGHTS)
        pixels = {}
        if NORMALIZATION in manifest["files"]:
            pixels = storage.read_listed_tensors(folder, manifest, NORMALIZATION)
        try:
            spec = _trusted(folder, from_dict(NetworkSpec, manifest["network"]), network)
            classes, shape = tuple(map(str, manifest["classes"])), tuple(manifest["shape"])
            return cls(
                name=str(manifest["name"]),
                spec=spec,
                network=filled(spec, shape, len(classes), weights, device),
                classes=classes,
                shape=shape,
                normalization=Normalization.from_json(manifest["normalization"], pixels),
                accuracy=float(manifest["accuracy"]),
                performance=None if manifest["performance"] is None else float(manifest["performance"]),
                history=dict(manifest["history"]),
            )
        except BadArtifact:
            raise
        except (DistillError, LookupError, TypeError, ValueError) as error:
            raise BadArtifact(folder / MANIFEST, f"does not describe a teacher ({error})") from error


def recognised(network: nn.Module, source: ImageSource, most: int = _PROBED) -> float:
    """Share, in [0, 1], of training images that a network gets right: about ``most``, the first ones of each class."""
    each = max(1, most // source.num_classes)
    rows = torch.cat(
        [torch.arange(first, first + min(each, n)) for first, n in zip(source.offsets, source.counts, strict=False)]
    ).to(source.device)
    right = 0
    with evaluation_mode(network), torch.no_grad():
        for part in torch.split(rows, default_chunk(source.shape, source.device)):
            right += int((network(source.gather(part)).argmax(1) == source.targets[part]).sum())
    return right / len(rows)


def filled(
    spec: NetworkSpec,
    shape: tuple[int, int, int],
    num_classes: int,
    weights: Mapping[str, Tensor],
    device: torch.device | str,
) -> nn.Module:
    """A network with given parameters and buffers.

    Raises:
        InvalidSetting: they are not those of such a network; what is missing or too much is named.
    """
    network = spec.build(shape, num_classes, generator=torch.Generator().manual_seed(0), device=device)
    own = network.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or foreign or other:
        told = [
            f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", foreign), ("of another shape", sorted(other)))
            if names
        ]
        raise InvalidSetting("weights", spec.name, f"for {num_classes} classes of {shape} images: {'; '.join(told)}")
    network.load_state_dict(dict(weights))
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file that somebody made.

    Raises:
        BadArtifact: missing, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # the library has its own kinds
        raise BadArtifact(path, f"cannot be read as safetensors ({error}); pickled files are never read") from error


def is_foreign(network: str) -> bool:
    """Whether a network of that name is made by code of others than this package, torchvision and timm."""
    library, colon, _ = network.partition(":")
    return bool(colon) and library not in ("torchvision", "timm")


def _trusted(folder: Path, stored: NetworkSpec, given: NetworkSpec | None) -> NetworkSpec:
    if given is not None and given != stored:
        raise BadArtifact(folder / MANIFEST, f"is a {stored}, not a {given}")
    if is_foreign(stored.name) and given is None:
        raise BadArtifact(
            folder / MANIFEST,
            f"names the factory {stored.name!r}, whose code would be run: say that you trust it by passing network=",
        )
    return stored


def _short(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
