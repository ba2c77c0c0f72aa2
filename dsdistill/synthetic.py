"""The result of a distillation: a small labelled image set that explains itself.

On disk it is a folder: ``images.safetensors`` and ``labels.safetensors`` (the stored form),
``normalization.safetensors`` (where pixels were whitened), ``dataset.json`` (what it is, how it was made, sha256 of
every file; written last), ``README.md`` (a card) and ``grid.png``.
Nothing in it is ever unpickled, and reading it needs no code of the method that made it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsdistill import exchange
from dsdistill.core import storage
from dsdistill.core.config import require_instance, whole_number
from dsdistill.core.device import is_out_of_memory
from dsdistill.data import Normalization
from dsdistill.errors import BadArtifact, BadData, DistillError, InvalidSetting, OutputConflict, ShapeMismatch
from dsdistill.exchange import Export, encode_png
from dsdistill.exchange.card import write_card
from dsdistill.exchange.hub import Shared
from dsdistill.labels import KINDS, HardLabels, Labels, SoftLabels
from dsdistill.parameterizations import FORMS, Parameterization, Pixels, Tiles
from dsdistill.recipe import Recipe

MANIFEST = "dataset.json"
SCHEMA_VERSION = 2
_LEARNED, _NORMALIZATION = "learned.", "normalization.safetensors"
_MISDESCRIBED = (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)
"""What a manifest with entries of another kind, size or depth than ours makes Python and torch raise."""


class Bytes(NamedTuple):
    """Size of the stored form in bytes: images, labels, and further learned tensors."""

    images: int
    labels: int
    learned: int = 0

    @property
    def total(self) -> int:
        """All of it: the budget a set spends."""
        return sum(self)


@dataclass(frozen=True, eq=False)
class SyntheticDataset(Shared, Dataset[tuple[Tensor, Any]]):
    """A distilled image set, usable as a `torch.utils.data.Dataset` at once.

    Item i is ``(image, target)``: the image (C, H, W), float32, standardised with `normalization` (so a
    network can take it as it is), the target an int class (hard labels) or a (K,) float tensor.

    Args:
        images: the stored form, N items that decode to M >= N images.
        labels: N labels over ``len(classes)`` classes.
        normalization: how pixels in [0, 1] were standardised; travels with the set.
        classes: class names, in label order.
        recipe: how the set was made.
        learned: further learned tensors that a training protocol may want (a step size, say).
        transform: applied to each image by ``__getitem__``.

    Example:
        >>> import dsdistill as dd
        >>> from torch.utils.data import DataLoader
        >>> synthetic = dd.synthesize(dd.methods.RandomReal(ipc=2), dd.data.load("digits"))
        >>> images, targets = next(iter(DataLoader(synthetic, batch_size=5)))
        >>> images.shape, targets.tolist()
        (torch.Size([5, 1, 8, 8]), [0, 0, 1, 1, 2])
    """

    FILES: ClassVar = ("images.safetensors", "labels.safetensors", _NORMALIZATION, "grid.png", "README.md")
    """What `save` writes, in this order, before ``dataset.json``; the third only where pixels were whitened."""

    images: Parameterization
    labels: Labels
    normalization: Normalization
    classes: tuple[str, ...]
    recipe: Recipe
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    transform: Callable[[Tensor], Any] | None = None

    def __post_init__(self) -> None:
        if self.images.count != self.labels.count:
            raise BadData(f"{self.images.count} stored images but {self.labels.count} labels")
        if self.labels.num_classes != len(self.classes):
            raise BadData(f"labels over {self.labels.num_classes} classes but {len(self.classes)} class names")
        if len(set(self.classes)) < len(self.classes):
            raise BadData(f"class names repeat: {self.classes!r}; give each class a name of its own")
        decoded = tuple(self.images.decode(torch.tensor([0])).images.shape) if self.images.count else ()
        if len(decoded) != 4 or decoded[1] != len(self.normalization.mean):
            raise ShapeMismatch("the decoded images", decoded, f"(M, {len(self.normalization.mean)}, H, W), M > 0")

    @classmethod
    def from_tensors(
        cls,
        images: Tensor,
        targets: Tensor,
        *,
        normalization: Normalization,
        classes: Sequence[str],
        factor: int = 1,
        source: str = "unknown",
        method: Mapping[str, Any] | None = None,
        learned: Mapping[str, Tensor] | None = None,
        notes: Sequence[str] = (),
    ) -> Self:
        """A set of images made elsewhere.

        Args:
            images: (N, C, H, W), floats (a tensor or an array), standardised by ``normalization``.
            targets: (N,) integer classes, or (N, K) probabilities.
            normalization: how the pixels were standardised; ``Normalization((0,) * C, (1,) * C)`` if they are in 0..1.
            classes: K class names, in label order.
            factor: tiles along each side of an image, see `dsdistill.parameterizations.tiles`.
            source: name of the real data.
            method: how they were made, for the record.
            learned: further learned tensors.
            notes: what a reader must know.

        Raises:
            BadData, ShapeMismatch: shapes, types or numbers do not fit together.
        """
        images, targets = torch.as_tensor(images), torch.as_tensor(targets)
        if not images.is_floating_point():
            raise BadData(f"images have dtype {images.dtype}; give standardised floats (normalization.standardize)")
        if not bool(torch.isfinite(images).all() and torch.isfinite(targets).all()):
            raise BadData("images or targets hold NaN or infinity")
        made_for = targets if targets.dim() == 1 else targets.argmax(1)
        labels: Labels = HardLabels(made_for, len(classes))
        if targets.dim() == 2:
            total = targets.sum(1)
            if not bool(((total - 1).abs() < 1e-3).all()) or bool((targets < 0).any()):
                raise BadData("soft targets must be probabilities: not negative, and 1 in sum for each image")
            labels = SoftLabels(targets.float().clamp_min(1e-12).log(), made_for)
        return cls(
            images=Pixels(images.float()) if factor == 1 else Tiles(images, torch.full((len(images),), factor)),
            labels=labels,
            normalization=normalization,
            classes=tuple(classes),
            recipe=Recipe({"type": "made elsewhere", **(method or {})}, 0, {"name": source}, notes=tuple(notes)),
            learned=dict(learned or {}),
        )

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            images, owner = self.images.decode()
            return images.detach().cpu(), self.labels.target(owner).detach().cpu(), self.labels.classes[owner]

    @property
    def _images(self) -> Tensor:
        return self._decoded[0]

    @property
    def _targets(self) -> Tensor:
        return self._decoded[1]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self._images[index], self._targets[index]
        return (
            image if self.transform is None else self.transform(image),
            int(target) if target.dim() == 0 else target,
        )

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All decoded images (M, C, H, W), float32, standardised, and their targets (M,) or (M, K); on the CPU."""
        return self._images, self._targets

    @property
    def targets(self) -> list[int]:
        """The class that every decoded image was made for, also where the label it learned ranks another first."""
        classes: list[int] = self._decoded[2].tolist()
        return classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> label."""
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a decoded image."""
        _, channels, height, width = self.images.decode(torch.tensor([0])).images.shape
        return channels, height, width

    @property
    def counts(self) -> tuple[int, ...]:
        """Stored images of every class."""
        return tuple(torch.bincount(self.labels.classes, minlength=len(self.classes)).tolist())

    @property
    def ipc(self) -> int:
        """Stored images per class; of the largest class where classes differ (see `counts`)."""
        return max(self.counts)

    @property
    def nbytes(self) -> Bytes:
        """Bytes of the stored form: images, labels, learned tensors."""
        learned = sum(tensor.numel() * tensor.element_size() for tensor in self.learned.values())
        return Bytes(self.images.nbytes, self.labels.nbytes, learned)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return (
            f"SyntheticDataset({self.recipe.title}, {len(self.classes)} classes, ipc={self.ipc}, "
            f"{len(self)} images {size}, {self.images.key} form, {self.labels.key} labels, "
            f"{self.nbytes.images:,} + {self.nbytes.labels:,} bytes, source={self.recipe.source.get('name')!r})"
        )

    def subset(self, ipc: int) -> "SyntheticDataset":
        """The first ``ipc`` stored images of each class, as a set of its own.

        Raises:
            InvalidSetting: ``ipc`` is below 1 or above what every class has.
        """
        ipc = whole_number("ipc", ipc)
        if not 1 <= ipc <= min(self.counts):
            raise InvalidSetting("ipc", ipc, f"this set holds between 1 and {min(self.counts)} images of every class")
        order = torch.argsort(self.labels.classes, stable=True)
        starts = torch.tensor([0, *self.counts[:-1]]).cumsum(0)
        index = order[(starts[:, None] + torch.arange(ipc)).flatten()]
        recipe = replace(self.recipe, notes=(*self.recipe.notes, f"first {ipc} of {self.ipc} images per class"))
        return replace(self, images=self.images.subset(index), labels=self.labels.subset(index), recipe=recipe)

    @classmethod
    def join(cls, parts: Sequence["SyntheticDataset"]) -> "SyntheticDataset":
        """Parts of one task (class ranges, say) as one set, ordered by class.

        Raises:
            BadData: no part, or parts that differ in form, label kind, classes, shape or normalisation.
        """
        if not parts:
            raise BadData("there is nothing to join: give at least one set")
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts[1:]:
            for what in ("normalization", "classes", "shape"):
                if getattr(part, what) != getattr(first, what):
                    raise BadData(f"cannot join sets whose {what} differ")
            if type(part.images) is not type(first.images) or type(part.labels) is not type(first.labels):
                raise BadData("cannot join sets of different form or label kind")
            if part.learned or first.learned:
                raise BadData("cannot join sets that carry learned tensors of their own")
        images = type(first.images).join([part.images for part in parts])
        labels = type(first.labels).join([part.labels for part in parts])
        order = torch.argsort(labels.classes, stable=True)
        return replace(first, images=images.subset(order), labels=labels.subset(order))

    def grid(self, per_class: int = 10) -> Tensor:
        """A picture of the set, (3, H', W') uint8: the first 20 classes, ``per_class`` images each.

        One row per class; a set with one image per class is laid out ten in a row.
        """
        from torchvision.utils import make_grid

        unit = self.normalization.to_unit(self._images).clamp(0, 1)
        unit = unit.expand(-1, 3, -1, -1) if unit.shape[1] == 1 else unit[:, :3]
        targets = torch.tensor(self.targets)
        columns = min(per_class, int(torch.bincount(targets).max()))
        blank = torch.ones(columns, *unit.shape[1:])
        rows = [torch.cat([unit[targets == c][:columns], blank])[:columns] for c in range(min(20, len(self.classes)))]
        zoom = max(1, 64 // unit.shape[-1])
        tiles = torch.cat(rows).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
        picture: Tensor = make_grid(tiles, nrow=columns if columns > 1 else 10, padding=2, pad_value=1.0)
        return (picture * 255).round().to(torch.uint8)

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the set into a folder (made if needed); never overwrites another set.

        Raises:
            OutputConflict: the folder holds a set already, is a file, or cannot be written.
            OutOfSpace: the disk is full.
        """
        folder = Path(path)
        storage.ensure_writable(folder)
        if os.path.lexists(folder / MANIFEST):
            raise OutputConflict(folder, f"holds a synthetic set already ({MANIFEST}); choose another folder")
        files = self.files()
        first, *others = files  # an interrupted save leaves the first; without it, the others are somebody else's
        foreign = [name for name in others if (folder / name).exists() and not (folder / first).exists()]
        if foreign:
            raise OutputConflict(folder, f"holds a {foreign[0]} that is no part of a set; choose another folder")
        storage.write_folder(folder, files, MANIFEST, self._manifest())
        return folder

    @classmethod
    def load(cls, path: str | Path) -> "SyntheticDataset":
        """Read a set written by `save`, after checking every byte of its manifest, images and labels.

        Raises:
            BadArtifact: missing, incomplete, damaged, unsafe, or from a newer version.
        """
        require_instance("path", path, (str, os.PathLike), "the folder of a saved set")
        folder = Path(path)
        manifest = read_manifest(folder)
        try:
            return cls._from_manifest(folder, manifest)
        except BadArtifact:
            raise
        except (*_MISDESCRIBED, DistillError) as error:
            if is_out_of_memory(error):
                raise
            raise BadArtifact(folder / MANIFEST, f"does not describe a synthetic set ({error!r})") from error

    @classmethod
    def _from_manifest(cls, folder: Path, manifest: Mapping[str, Any]) -> "SyntheticDataset":
        image_tensors = storage.read_listed_tensors(folder, manifest, "images.safetensors")
        label_tensors = storage.read_listed_tensors(folder, manifest, "labels.safetensors")
        form, kind = FORMS.get(manifest["form"]), KINDS.get(manifest["label_kind"])
        if form is None or kind is None:
            asked = f"form {manifest['form']!r} with {manifest['label_kind']!r} labels"
            raise BadArtifact(folder / MANIFEST, f"{asked} is unknown here: install a newer dsdistill")
        learned = {k.removeprefix(_LEARNED): v for k, v in image_tensors.items() if k.startswith(_LEARNED)}
        stored = {k: v for k, v in image_tensors.items() if not k.startswith(_LEARNED)}
        names = manifest["classes"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadArtifact(folder / MANIFEST, f"its classes are no list of names, but {names!r}")
        whitened = _NORMALIZATION in manifest["files"]
        matrices = storage.read_listed_tensors(folder, manifest, _NORMALIZATION) if whitened else {}
        made = cls(
            images=form.restore(stored, manifest["form_settings"]),
            labels=kind.restore(label_tensors, manifest["label_settings"]),
            normalization=Normalization.from_json(manifest["normalization"], matrices),
            classes=tuple(names),
            recipe=Recipe.from_json(manifest["recipe"]),
            learned=learned,
        )
        actual = made._manifest()
        if manifest["schema_version"] == 1:  # counted no learned tensors
            actual["bytes"].pop("learned")
        wrong = [key for key in ("count", "ipc", "shape", "bytes") if manifest[key] != actual[key]]
        if wrong:
            stated = ", ".join(f"{key} {manifest[key]} for {actual[key]}" for key in wrong)
            raise BadArtifact(folder / MANIFEST, f"contradicts its tensors: it states {stated}")
        return made

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": "dsdistill.synthetic",
            "schema_version": SCHEMA_VERSION,
            "classes": list(self.classes),
            "count": self.images.count,
            "ipc": self.ipc,
            "shape": list(self.shape),
            "form": self.images.key,
            "form_settings": self.images.settings(),
            "label_kind": self.labels.key,
            "label_settings": self.labels.settings(),
            "normalization": self.normalization.to_json(),
            "bytes": self.nbytes._asdict(),
            "recipe": self.recipe.to_json(),
        }

    def files(self) -> dict[str, bytes]:
        """What `save` writes beside ``dataset.json``: file name -> content."""
        learned = {f"{_LEARNED}{name}": tensor for name, tensor in self.learned.items()}
        whitening = self.normalization.tensors()
        contents = (
            storage.encode_tensors({**self.images.tensors(), **learned}),
            storage.encode_tensors(self.labels.tensors()),
            storage.encode_tensors(whitening) if whitening else None,
            encode_png(self.grid()),
            write_card(self).encode("utf-8", "replace"),
        )
        return {name: data for name, data in zip(self.FILES, contents, strict=True) if data is not None}

    def export(self, path: str | Path, format: str = "folder") -> Export:
        """Write the set for other programs.

        Formats: "folder" (8-bit PNG files by class), "npz" (arrays), "pt" (a folder of ``images.pt``, ``labels.pt``
        and, where it was learned, ``lr.pt``), "parquet" (8-bit images, as Hugging Face data sets keep them). A warning
        names what was learned and has no place in the format.

        Raises:
            InvalidSetting: unknown format. OutputConflict: the target exists. OutOfSpace: the disk is full.
            MissingExtra: parquet needs dsdistill[hub].
        """
        return exchange.export(self, Path(path), format)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked ``dataset.json`` of a saved set.

    Raises:
        BadArtifact: missing, damaged, no set, or from a newer version.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise BadArtifact(folder, "is a file; a synthetic set is a folder (pickled .pt files are never read)")
    if os.path.exists(folder / "run" / "run.json") and not os.path.exists(folder / MANIFEST):
        raise BadArtifact(folder, "holds a run that is not finished: the same synthesize command continues it")
    manifest = storage.read_manifest(folder / MANIFEST)
    if manifest.get("format") != "dsdistill.synthetic":
        raise BadArtifact(folder / MANIFEST, "does not describe a synthetic set of dsdistill")
    found = manifest.get("schema_version")
    if type(found) is not int or not 1 <= found <= SCHEMA_VERSION:  # a bool is an int
        newer = type(found) is int and found > SCHEMA_VERSION
        known = f"newer than {SCHEMA_VERSION}: upgrade dsdistill" if newer else f"known are 1 to {SCHEMA_VERSION}"
        raise BadArtifact(folder / MANIFEST, f"has schema version {found}, {known}")
    return manifest
