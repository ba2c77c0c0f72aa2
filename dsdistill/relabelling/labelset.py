"""The labels that teachers gave a set, as an artefact of their own: a folder, read one epoch at a time.

::

    FOLDER/epoch-00000.safetensors   what the first pass shows, and the labels of it; one file for each epoch
    FOLDER/static.safetensors        or, of static labels, this one file
    FOLDER/labels.json               what they are (`Heading`), sha256 of every file; written last
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from dsdistill.core import storage
from dsdistill.core.config import require_instance
from dsdistill.core.rng import Rng
from dsdistill.errors import BadArtifact, BadData, DistillError, InvalidSetting, OutputConflict
from dsdistill.relabelling.distances import lesson_targets
from dsdistill.relabelling.heading import (
    FORMAT,
    KEPT,
    LABEL,
    MANIFEST,
    RECORD,
    SCHEMA_VERSION,
    STATIC,
    Heading,
    file_name,
    images_digest,
    record_digest,
)
from dsdistill.relabelling.lessons import Lessons, interpolated, replayed
from dsdistill.relabelling.record import EpochRecord
from dsdistill.relabelling.replay import Replay
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import Lesson, TrainingRecipe, TrainingSet

Files = Mapping[str, Mapping[str, Any]]
"""Name -> {"bytes", "sha256"}."""
_MISDESCRIBED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, DistillError)


@dataclass(frozen=True, eq=False)
class Pass:
    """One epoch of labels, as stored: what it shows, its encoded labels, and which views are kept (None: all)."""

    record: EpochRecord
    stored: Mapping[str, Tensor]
    kept: Tensor | None


class LabelSet:
    """Labels of a set of images.

    Args:
        heading: what they are.
        files: size and sha256 of each file.
        folder: where the files are; None where they are ``held`` in memory.
        held: name -> content.

    Example:
        >>> import dsdistill as dd
        >>> from dsdistill.relabelling import LabelSet
        >>> labels = LabelSet.load("labels")  # doctest: +SKIP
        >>> loader = DataLoader(labels.replay(synthetic, epoch=3), batch_size=labels.batch_size)  # doctest: +SKIP
    """

    def __init__(
        self, heading: Heading, files: Files, folder: Path | None = None, held: Mapping[str, bytes] | None = None
    ) -> None:
        self.heading, self.files, self.folder, self._held = heading, files, folder, held

    @classmethod
    def load(cls, path: str | Path) -> "LabelSet":
        """Open a folder of labels. Its manifest is checked now, each file when it is read.

        Raises:
            BadArtifact: missing, not finished, damaged, or from a newer version.
        """
        require_instance("path", path, (str, os.PathLike), "the folder of saved labels")
        folder = Path(path)
        manifest = storage.read_manifest(folder / MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("schema_version") != SCHEMA_VERSION:
            found = f"{manifest.get('format')!r} of version {manifest.get('schema_version')!r}"
            raise BadArtifact(folder / MANIFEST, f"is {found}, no labels of version {SCHEMA_VERSION}")
        try:
            heading, files = Heading.from_json(manifest), manifest["files"]
            named = list(files) == heading.names
        except _MISDESCRIBED as error:
            raise BadArtifact(folder / MANIFEST, f"does not describe labels ({error!r})") from error
        if not named:
            raise BadArtifact(folder / MANIFEST, "lists other files than its epochs have")
        return cls(heading, files, folder)

    def save(self, path: str | Path) -> Path:
        """Write labels held in memory into a folder (made if needed), or copy those of a folder.

        Raises:
            OutputConflict: the folder holds labels already, is a file, or cannot be written.
            OutOfSpace: the disk is full. BadArtifact: a file to copy is damaged.
        """
        folder = Path(path)
        storage.ensure_writable(folder)
        if os.path.lexists(folder / MANIFEST):
            raise OutputConflict(folder, f"holds labels already ({MANIFEST}); choose another folder")
        storage.require_space(folder, self.nbytes)
        for name in self.heading.names:
            storage.write_bytes(folder / name, self._content(name))
        storage.write_json(folder / MANIFEST, self.heading.manifest(self.files))
        return folder

    @property
    def kind(self) -> str:
        """ "replayed", "static" or "distances"."""
        return self.heading.kind

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.heading.classes

    @property
    def epochs(self) -> int | None:
        """How many epochs are labelled; None for static labels, which serve any number."""
        return self.heading.epochs

    @property
    def recipe(self) -> TrainingRecipe | None:
        """Whose views, mixes and mini-batches are recorded; None for static labels."""
        return self.heading.recipe

    @property
    def batch_size(self) -> int | None:
        """Images of a mini-batch; None for static labels."""
        return None if self.recipe is None else self.recipe.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest among them."""
        manifest = storage.encode_json(self.heading.manifest(self.files))
        return sum(int(entry["bytes"]) for entry in self.files.values()) + len(manifest)

    def __repr__(self) -> str:
        heading, passes = self.heading, "" if self.epochs is None else f", {self.epochs} epochs"
        teachers = ", ".join(str(teacher["name"]) for teacher in heading.teachers)
        return f"LabelSet({heading.kind}, {heading.count} images{passes}, {self.nbytes:,} bytes, teachers: {teachers})"

    def require(self, synthetic: SyntheticDataset) -> None:
        """Refuse images that these labels are not of.

        Raises:
            BadData: other classes, another shape or number of images, other images or another order of them.
        """
        heading = self.heading
        if synthetic.classes != heading.classes:
            same = set(synthetic.classes) == set(heading.classes)
            problem = "the same classes in another order" if same else "other classes"
            raise BadData(f"the labels are over {problem} than the set has: give the labels that were made for it")
        if (len(synthetic), synthetic.shape) != (heading.count, heading.shape):
            raise BadData(
                f"the labels are of {heading.count} images of shape {heading.shape}, the set decodes to "
                f"{len(synthetic)} of {synthetic.shape}: give the labels that were made for it"
            )
        if images_digest(synthetic) != heading.images:
            raise BadData(
                "the labels are of other images than the set has, or of another order of them: label it anew "
                "(dsdistill relabel)"
            )

    def verify(self, epochs: int | None = None) -> None:
        """Read every file, or those of the first ``epochs``.

        Raises:
            BadArtifact: naming the first that is missing, damaged or none.
        """
        if self.epochs is None:
            self.static()
            return
        for epoch in range(self.epochs if epochs is None else min(epochs, self.epochs)):
            self.epoch(epoch)

    def epoch(self, number: int) -> Pass:
        """One epoch.

        Raises:
            InvalidSetting: there is none of that number.
            BadArtifact: its file is missing, damaged, or holds something else; or it is to be drawn anew, and this
                torch draws other numbers than the one that made it.
        """
        recipe, heading = self.recipe, self.heading
        if recipe is None or self.epochs is None or not 0 <= number < self.epochs:
            there = "static labels have no epochs" if self.epochs is None else f"from 0 to {self.epochs - 1}"
            raise InvalidSetting("epoch", number, there)
        name = file_name(number)
        tensors = self._tensors(name)
        kept, record = tensors.pop(KEPT, None), _part(tensors, RECORD)
        try:
            if heading.records == "stored":
                made = EpochRecord.of_tensors(record, recipe, heading.count, heading.shape)
            else:
                made = EpochRecord.draw(recipe, heading.count, heading.shape, stream(heading.seed), number)
                if not torch.equal(record_digest(made.tensors()), record["digest"]):
                    told = f"its views cannot be drawn again: torch {torch.__version__} draws other numbers than the "
                    raise BadData(f"{told}{heading.versions.get('torch')} that it was made with")
        except BadData as error:
            raise BadArtifact(self._place(name), str(error)) from error
        return Pass(made, _part(tensors, LABEL), kept)

    def static(self) -> Tensor:
        """(N, K), float32: logits of the clean images.

        Raises:
            InvalidSetting: these are labels of views. BadArtifact: the file is missing or damaged.
        """
        if self.kind != "static":
            raise InvalidSetting("kind", self.kind, "static labels; these are read by epoch")
        return self.heading.codec.decode(_part(self._tensors(STATIC), LABEL), self.heading.width)

    def lessons(
        self,
        synthetic: SyntheticDataset,
        device: torch.device | str = "cpu",
        *,
        recipe: TrainingRecipe | None = None,
        rng: Rng | None = None,
    ) -> Lessons:
        """What `dsdistill.training.TrainingSet` takes: the mini-batches of each epoch with their labels.

        Views that a calibration left out are not in their mini-batch, and a mini-batch of such views alone is skipped.

        Args:
            synthetic: the set that the labels are of.
            device: where the images shall be.
            recipe: of static labels: whose views and mixes are drawn. Logits are mixed as the pixels are (UFC).
            rng: of static labels: from which streams.

        Raises:
            BadData: the labels are of another set.
            InvalidSetting: static labels without recipe or rng, or with views that cannot be recorded.
        """
        self.require(synthetic)
        images, targets = (tensor.to(device) for tensor in synthetic.tensors())
        if self.kind != "static":
            classes = torch.tensor(synthetic.targets, device=images.device)
            return lambda epoch: self._replayed(images, targets, classes, epoch)
        if recipe is None or rng is None:
            raise InvalidSetting("recipe", recipe, "static labels need a recipe and an rng: which views are shown")
        return interpolated(TrainingSet.of(images, targets), self.static().to(device), recipe, rng, len(self.classes))

    def _replayed(self, images: Tensor, targets: Tensor, classes: Tensor, epoch: int) -> Iterator[Lesson]:
        taught = self.epoch(epoch)

        def labels(span: slice) -> Tensor:
            stored = {name: tensor[span].to(images.device) for name, tensor in taught.stored.items()}
            told = self.heading.codec.decode(stored, self.heading.width)
            if self.kind != "distances":
                return told
            return lesson_targets(told, *taught.record.pairs(span.start // taught.record.recipe.batch_size, classes))

        yield from replayed(images, targets, taught.record, labels, taught.kept, len(self.classes))

    def replay(self, synthetic: SyntheticDataset, epoch: int) -> Replay:
        """One epoch as a `torch.utils.data.Dataset`; see `Replay`.

        Raises:
            BadData: the labels are of another set. InvalidSetting, BadArtifact: as `epoch`.
        """
        self.require(synthetic)
        taught = self.epoch(epoch)
        labels = self.heading.codec.decode(taught.stored, self.heading.width)
        return Replay(synthetic.tensors()[0], taught.record, labels, taught.kept)

    def _place(self, name: str) -> Path:
        return Path(name) if self.folder is None else self.folder / name

    def _content(self, name: str) -> bytes:
        if self.folder is None:
            assert self._held is not None
            return self._held[name]
        return storage.read_listed(self.folder, {"files": self.files}, name)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if self.folder is None:
            tensors = load(self._content(name))
        else:
            tensors = storage.read_listed_tensors(self.folder, {"files": self.files}, name)
        found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        if found != self.heading.layout():
            raise BadArtifact(self._place(name), f"holds {found}, where the manifest tells of {self.heading.layout()}")
        return tensors


def stream(seed: int) -> Rng:
    """The random streams from which the views of labels are drawn."""
    return Rng(seed, job="labels")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
