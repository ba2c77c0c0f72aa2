"""The result of a distillation: a small labelled image set that explains itself.

On disk it is a folder: ``images.safetensors`` and ``labels.safetensors`` (the stored form), ``dataset.json``
(what it is, how it was made, sha256 of every file; written last), ``README.md`` (a card) and ``grid.png``.
Nothing in it is ever unpickled, and reading it needs no code of the method that made it.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsdistill import exchange
from dsdistill.core import storage
from dsdistill.data import Normalization
from dsdistill.errors import BadArtifact, BadData, DistillError, InvalidSetting, OutputConflict, ShapeMismatch
from dsdistill.exchange import Export, encode_png
from dsdistill.labels import KINDS, Labels
from dsdistill.parameterizations import FORMS, Parameterization

MANIFEST = "dataset.json"
SCHEMA_VERSION = 1


class Bytes(NamedTuple):
    """Size of the stored form in bytes, images and labels apart."""

    images: int
    labels: int


@dataclass(frozen=True)
class Recipe:
    """How a set was made: enough to make it again.

    ``method``: class name and all settings; ``source``: name, fingerprint, classes and counts of the real
    data; ``execution``: what else decides the last bits (device type, threads, chunk); ``versions`` of the
    libraries; ``parents``: recipes of the sets this one was derived from; ``notes``: what a reader must know.
    """

    method: dict[str, Any]
    seed: int
    source: dict[str, Any]
    execution: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    parents: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self) | {"parents": list(self.parents), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Recipe":
        """Inverse of `to_json`."""
        return cls(**{**content, "parents": tuple(content["parents"]), "notes": tuple(content["notes"])})


@cache
def _versions() -> dict[str, str]:
    names = ("dsdistill", "torch", "torchvision", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def library_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return dict(_versions())


@dataclass(frozen=True, eq=False)
class SyntheticDataset(Dataset[tuple[Tensor, Any]]):
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

    FILES: ClassVar = ("images.safetensors", "labels.safetensors", "grid.png", "README.md")
    """What `save` writes, in this order, before ``dataset.json``."""

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
        decoded = tuple(self.images.decode(torch.tensor([0])).images.shape) if self.images.count else ()
        if len(decoded) != 4 or decoded[1] != len(self.normalization.mean):
            raise ShapeMismatch("the decoded images", decoded, f"(M, {len(self.normalization.mean)}, H, W), M > 0")

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            images, owner = self.images.decode()
            return images.detach().cpu(), self.labels.target(owner).detach().cpu()

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
        """Class index of every decoded image."""
        hard = self._targets if self._targets.dim() == 1 else self._targets.argmax(1)
        return [int(target) for target in hard]

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
        """Bytes of the stored form, images and labels apart."""
        return Bytes(self.images.nbytes, self.labels.nbytes)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return (
            f"SyntheticDataset({self.recipe.method.get('type', '?')}, {len(self.classes)} classes, ipc={self.ipc}, "
            f"{len(self)} images {size}, {self.images.key} form, {self.labels.key} labels, "
            f"{self.nbytes.images:,} + {self.nbytes.labels:,} bytes, source={self.recipe.source.get('name')!r})"
        )

    def subset(self, ipc: int) -> "SyntheticDataset":
        """The first ``ipc`` stored images of each class, as a set of its own.

        Raises:
            InvalidSetting: ``ipc`` is below 1 or above what every class has.
        """
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
        """
        folder = Path(path)
        storage.ensure_writable(folder)
        if (folder / MANIFEST).exists():
            raise OutputConflict(folder, f"holds a synthetic set already ({MANIFEST}); choose another folder")
        files = self._files()
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
        folder = Path(path)
        manifest = read_manifest(folder)
        try:
            return cls._from_manifest(folder, manifest)
        except BadArtifact:
            raise
        except (KeyError, TypeError, AttributeError, DistillError) as error:
            raise BadArtifact(folder / MANIFEST, f"does not describe a synthetic set ({error!r})") from error

    @classmethod
    def _from_manifest(cls, folder: Path, manifest: Mapping[str, Any]) -> "SyntheticDataset":
        image_tensors = storage.read_listed_tensors(folder, manifest, "images.safetensors")
        label_tensors = storage.read_listed_tensors(folder, manifest, "labels.safetensors")
        form, kind = FORMS.get(manifest["form"]), KINDS.get(manifest["label_kind"])
        if form is None or kind is None:
            asked = f"form {manifest['form']!r} with {manifest['label_kind']!r} labels"
            raise BadArtifact(folder / MANIFEST, f"{asked} is unknown here: install a newer dsdistill")
        learned_prefix = "learned."
        learned = {k.removeprefix(learned_prefix): v for k, v in image_tensors.items() if k.startswith(learned_prefix)}
        stored = {k: v for k, v in image_tensors.items() if not k.startswith(learned_prefix)}
        made = cls(
            images=form.restore(stored, manifest["form_settings"]),
            labels=kind.restore(label_tensors, manifest["label_settings"]),
            normalization=Normalization.from_json(manifest["normalization"]),
            classes=tuple(manifest["classes"]),
            recipe=Recipe.from_json(manifest["recipe"]),
            learned=learned,
        )
        actual = made._manifest()
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

    def _files(self) -> dict[str, bytes]:
        learned = {f"learned.{name}": tensor for name, tensor in self.learned.items()}
        contents = (
            storage.encode_tensors({**self.images.tensors(), **learned}),
            storage.encode_tensors(self.labels.tensors()),
            encode_png(self.grid()),
            _card(self).encode("utf-8", "replace"),
        )
        return dict(zip(self.FILES, contents, strict=True))

    def export(self, path: str | Path, format: str = "folder") -> Export:
        """Write 8-bit PNG files by class ("folder") or float arrays ("npz") for other programs.

        Raises:
            InvalidSetting: unknown format. OutputConflict: the target exists.
        """
        return exchange.export(self, Path(path), format)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked ``dataset.json`` of a saved set.

    Raises:
        BadArtifact: missing, damaged, no set, or from a newer version.
    """
    if folder.exists() and not folder.is_dir():
        raise BadArtifact(folder, "is a file; a synthetic set is a folder (pickled .pt files are never read)")
    manifest = storage.read_manifest(folder / MANIFEST)
    if manifest.get("format") != "dsdistill.synthetic":
        raise BadArtifact(folder / MANIFEST, "does not describe a synthetic set of dsdistill")
    if not isinstance(manifest.get("schema_version"), int) or manifest["schema_version"] > SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise BadArtifact(
            folder / MANIFEST, f"has schema version {found}, newer than {SCHEMA_VERSION}: upgrade dsdistill"
        )
    return manifest


def _card(synthetic: SyntheticDataset) -> str:
    recipe, size = synthetic.recipe, synthetic.nbytes
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in recipe.method.items() if key != "type")
    notes = "".join(f"- {note}\n" for note in recipe.notes)
    classes = ", ".join(synthetic.classes[:20]) + (", ..." if len(synthetic.classes) > 20 else "")
    source_name = str(recipe.source.get("name"))
    return f"""---
tags: [dataset-distillation]
source_datasets: [{json.dumps(source_name)}]
task_categories: [image-classification]
---

# {recipe.method.get("type", "Synthetic set")}: {synthetic.ipc} per class of {source_name}

![the images, class by class](grid.png)

{len(synthetic)} synthetic images {"x".join(map(str, synthetic.shape))} (channels x height x width) of
{len(synthetic.classes)} classes ({classes}), distilled from {sum(recipe.source.get("counts", []))} real images.
Stored: {size.images:,} bytes of images ({synthetic.images.key}) and {size.labels:,} of labels ({synthetic.labels.key}).

{notes}
```python
import dsdistill as dd

synthetic = dd.SyntheticDataset.load("path/to/this/folder")
image, target = synthetic[0]  # float32, standardised: ready for a network
```

Pixels are standardised with mean {list(synthetic.normalization.mean)} and standard deviation
{list(synthetic.normalization.std)}; `synthetic.normalization.to_unit` brings them back to [0, 1].

| setting | value |
|---|---|
{settings}

Seed {recipe.seed}; source fingerprint `{recipe.source.get("fingerprint")}`;
{", ".join(f"{name} {number}" for name, number in recipe.versions.items())}.
The images derive from the source data: its licence and terms apply to them.
"""
