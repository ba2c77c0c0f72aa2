"""What a set of labels is, as its manifest says it, and how many bytes it takes, before the first label is made."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from dsdistill.core import storage
from dsdistill.core.config import from_dict, to_dict
from dsdistill.recipe import library_versions
from dsdistill.relabelling import record
from dsdistill.relabelling.calibration import FerKD
from dsdistill.relabelling.codecs import Codec
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import TrainingRecipe

MANIFEST, STATIC = "labels.json", "static.safetensors"
FORMAT, SCHEMA_VERSION = "dsdistill.labels", 1
LABEL, RECORD, KEPT = "label.", "record.", "kept"
Kind = Literal["replayed", "static", "distances"]
KINDS: tuple[Kind, ...] = ("replayed", "static", "distances")
Records = Literal["stored", "drawn"]
_DIGEST_BYTES = 32
_MOST_EPOCHS = 10**6
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Heading:
    """What is asked of teachers about a set.

    Attributes:
        kind: "replayed" (logits of the views of every epoch), "static" (logits of the clean images, once) or
            "distances" (two numbers for each view of every epoch).
        classes: names, in label order.
        count, shape: N images of (C, H, W).
        images: digest of the decoded images and their classes.
        teachers: name, digest and accuracy of each member.
        weights: of their logits, of sum 1.
        vote_temperature: by which they are; None: all alike.
        teacher_mode: "eval" (running statistics) or "batch" (those of each part of a mini-batch).
        recipe: whose views, mixes and mini-batches are recorded; of a static set, None.
        epochs: how many; of a static set, None.
        codec: how logits or distances are stored.
        calibration: which views are labelled otherwise; None: all by the teachers.
        records: "stored", or "drawn" anew from the seed at each reading, with a digest to tell whether they are equal.
        seed: every draw is a function of it.
        execution: what else decides the last bits.
        versions: of the libraries.
    """

    kind: Kind
    classes: tuple[str, ...]
    count: int
    shape: tuple[int, int, int]
    images: str
    teachers: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...]
    vote_temperature: float | None
    teacher_mode: Literal["eval", "batch"]
    recipe: TrainingRecipe | None
    epochs: int | None
    codec: Codec
    calibration: FerKD | None
    records: Records
    seed: int
    execution: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)

    @property
    def width(self) -> int:
        """Numbers that an image's label is made of: K logits, or two distances."""
        return 2 if self.kind == "distances" else len(self.classes)

    @property
    def names(self) -> list[str]:
        """Of the files."""
        return [STATIC] if self.epochs is None else [file_name(epoch) for epoch in range(self.epochs)]

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for labels to be of one make."""
        return {key: value for key, value in self.to_json().items() if key not in ("execution", "versions")}

    def layout(self) -> Layout:
        """Tensors of one file.

        Raises:
            InvalidSetting: the codec does not fit.
        """
        made: Layout = {}
        if self.recipe is not None and self.records == "stored":
            made |= {f"{RECORD}{name}": kind for name, kind in self._record_layout(self.recipe).items()}
        elif self.recipe is not None:
            made[f"{RECORD}digest"] = (torch.uint8, (_DIGEST_BYTES,))
        for name, (dtype, numbers) in self.codec.layout(self.width).items():
            made[f"{LABEL}{name}"] = (dtype, (self.count, numbers) if numbers else (self.count,))
        if self.calibration is not None:
            made[KEPT] = (torch.bool, (self.count,))
        return made

    def _record_layout(self, recipe: TrainingRecipe) -> Layout:
        return record.layout(recipe, self.count, self.shape)

    def manifest(self, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The manifest over files of these sizes and sha256."""
        return storage.sealed({**self.to_json(), "files": {name: dict(entry) for name, entry in files.items()}})

    def predicted_bytes(self) -> int:
        """Bytes of all files and of the manifest, exactly."""
        size = file_bytes(self.layout())
        files = {name: {"bytes": size, "sha256": "0" * 64} for name in self.names}
        return size * len(files) + len(storage.encode_json(self.manifest(files)))

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        plain = {f.name: to_dict(getattr(self, f.name)) for f in fields(self)}
        return {"format": FORMAT, "schema_version": SCHEMA_VERSION, **plain}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Heading":
        """Inverse of `to_json`.

        Raises:
            UnknownName, InvalidSetting, LookupError, TypeError, ValueError: the content is none.
        """
        known = {f.name: content[f.name] for f in fields(cls) if f.name != "vote_temperature"}
        known["vote_temperature"] = content.get("vote_temperature")
        _check_types(known)
        if known["kind"] not in KINDS or (known["recipe"] is None) != (known["kind"] == "static"):
            raise ValueError(f"kind {known['kind']!r} with recipe {known['recipe']!r}")
        channels, height, width = map(int, known["shape"])
        made = {
            "classes": tuple(known["classes"]),
            "shape": (channels, height, width),
            "teachers": tuple(known["teachers"]),
            "weights": tuple(known["weights"]),
            "recipe": None if known["recipe"] is None else from_dict(TrainingRecipe, known["recipe"]),
            "codec": from_dict(Codec, known["codec"]),  # type: ignore[type-abstract]  # one of its subclasses is named
            "calibration": None if known["calibration"] is None else from_dict(FerKD, known["calibration"]),
        }
        return cls(**{**known, **made})


def _check_types(known: Mapping[str, Any]) -> None:
    """Refuse what no heading has.

    Raises:
        ValueError, TypeError: naming the field.
    """
    weights, teachers = known["weights"], known["teachers"]
    temperature, epochs = known["vote_temperature"], known["epochs"]
    right = {
        "count": type(known["count"]) is int and 0 < known["count"] < 2**40,
        "seed": type(known["seed"]) is int,
        "epochs": epochs is None or (type(epochs) is int and 0 < epochs <= _MOST_EPOCHS),
        "teacher_mode": known["teacher_mode"] in ("eval", "batch"),
        "records": known["records"] in ("stored", "drawn"),
        "vote_temperature": temperature is None or (isinstance(temperature, (int, float)) and temperature > 0),
        "teachers": bool(teachers) and all(isinstance(one, Mapping) and "digest" in one for one in teachers),
        "weights": all(isinstance(one, (int, float)) for one in weights) and abs(sum(weights) - 1) < 1e-3,
    }
    wrong = [name for name, fine in right.items() if not fine]
    if wrong or len(weights) != len(teachers):
        raise ValueError(f"{', '.join(wrong) or 'weights'} cannot be")
    if temperature is None and len(set(weights)) > 1:
        raise ValueError("made before it was recorded how teachers vote: label the set anew")


def file_name(epoch: int) -> str:
    """Of the file of ``epoch``."""
    return f"epoch-{epoch:05d}.safetensors"


def file_bytes(layout: Layout) -> int:
    """Size of a safetensors file of these tensors: its header, which says where each is, and their bytes."""
    header, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    told = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-told // 8) * 8 + end


def images_digest(synthetic: SyntheticDataset) -> str:
    """sha256 of the decoded images in their order, float32, and of their classes."""
    images, targets = synthetic.tensors()
    digest = hashlib.sha256(json.dumps([list(images.shape), list(targets.shape)]).encode())
    for tensor in (images, targets):
        for row in torch.split(tensor, 1024):
            digest.update(_bytes(row))
    return digest.hexdigest()


def record_digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """(32,) uint8: sha256 of a record as it would be stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
