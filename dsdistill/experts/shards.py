"""The file of one expert: its snapshots, what is needed to train it on, and a seal over both.

A safetensors file, written whole under a temporary name and renamed. Its tensors:

"snapshots"
    (epochs + 1, P): θ before training and after every epoch, float32 or float16.
"theta", and "velocity" where there is momentum
    (P,) float32: θ and SGD's v after the last epoch.

Its metadata tell the digest of the buffer it belongs to, the number of the expert and of its epochs, device and
versions, and "sha256": that of the other metadata and of all tensors. Only the rows that are asked for are read.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsdistill.core import storage
from dsdistill.errors import BadArtifact

FORMAT = {"format": "dsdistill.expert", "version": "1"}
_SEAL = "sha256"
_PART = 16 * 2**20  # bytes that are read at a time where all are
_known: dict[Path, tuple[tuple[int, int, int], "Heading"]] = {}  # path -> (inode, size, time), what it turned out to be


@dataclass
class Expert:
    """One expert so far, on the CPU.

    Attributes:
        index: which one of its buffer.
        rows: its snapshots (P,), in the precision in which they are stored.
        theta: its parameters (P,) float32.
        velocity: SGD's v (P,) float32, None without momentum.
        kept: epochs that the store has of it, -1 for none.
    """

    index: int
    rows: list[Tensor]
    theta: Tensor
    velocity: Tensor | None = None
    kept: int = -1

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As they stand in its file."""
        named = {"snapshots": torch.stack(self.rows), "theta": self.theta}
        return named if self.velocity is None else {**named, "velocity": self.velocity}

    @property
    def epochs(self) -> int:
        """Epochs of training behind it."""
        return len(self.rows) - 1


@dataclass(frozen=True)
class Heading:
    """What the metadata of a file say: its buffer, which expert, after how many epochs."""

    buffer: str
    index: int
    epochs: int


def file_name(index: int) -> str:
    """Of the file of expert ``index``."""
    return f"expert-{index:04d}.safetensors"


def file_bytes(expert: Expert, epochs: int) -> int:
    """Size of the file of an expert after ``epochs`` epochs, but for its header."""
    going_on = [expert.theta] if expert.velocity is None else [expert.theta, expert.velocity]
    return (epochs + 1) * expert.rows[0].nbytes + sum(tensor.nbytes for tensor in going_on)


def write(path: Path, expert: Expert, buffer: str, device: str) -> None:
    """Write a file, in place of what was there.

    Raises:
        OutOfSpace: the disk is full; what was there before is untouched.
    """
    tensors = expert.tensors
    about = {
        **FORMAT,
        "buffer": buffer,
        "expert": str(expert.index),
        "epochs": str(expert.epochs),
        "device": device,
        "dsdistill": metadata.version("dsdistill"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    digest = _started(about)
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    storage.write_bytes(path, save(tensors, {**about, _SEAL: digest.hexdigest()}))
    _known[path] = _state(path), Heading(buffer, expert.index, expert.epochs)


def check(path: Path) -> Heading:
    """What a file is, after its seal was compared; once in this process for as long as it looks unchanged.

    Raises:
        BadArtifact: missing, damaged, or no such file.
    """
    try:
        state = _state(path)
        known = _known.get(path)
        if known is None or known[0] != state:
            known = _known[path] = state, _examined(path)
        return known[1]
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, BadArtifact):
            raise
        raise BadArtifact(path, f"is no whole file of an expert ({error})") from None


def read_rows(path: Path, rows: Sequence[int]) -> list[Tensor]:
    """Snapshots (P,) of a file.

    Raises:
        BadArtifact: the file was removed or damaged meanwhile.
    """
    check(path)
    try:
        with safe_open(path, framework="pt") as file:
            snapshots = file.get_slice("snapshots")
            return [snapshots[row : row + 1][0] for row in rows]
    except (OSError, SafetensorError) as error:
        raise BadArtifact(path, f"cannot be read any more ({error})") from None


def read(path: Path) -> Expert:
    """All of a file, to train on.

    Raises:
        BadArtifact: missing, damaged, or no such file.
    """
    heading = check(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadArtifact(path, f"cannot be read any more ({error})") from None
    rows = list(tensors["snapshots"])
    return Expert(heading.index, rows, tensors["theta"], tensors.get("velocity"), heading.epochs)


def _examined(path: Path) -> Heading:
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata() or {})
        names = set(file.keys())
        if {key: about.get(key) for key in FORMAT} != FORMAT or names - {"velocity"} != {"snapshots", "theta"}:
            raise BadArtifact(path, "is no file of an expert, or one of another version")
        seal, digest = about.pop(_SEAL, None), _started(about)
        for name in sorted(names):
            for part in _parts(file, name):
                digest.update(_bytes(part))
        if seal != digest.hexdigest():
            raise BadArtifact(path, "its sha256 differs from what it says: it was altered or damaged")
        heading = Heading(about["buffer"], int(about["expert"]), int(about["epochs"]))
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    size = shapes["theta"][0]
    if shapes != {name: (heading.epochs + 1, size) if name == "snapshots" else (size,) for name in names}:
        raise BadArtifact(path, f"holds tensors of other shapes than it says: {shapes}")
    return heading


def _parts(file: Any, name: str) -> Iterator[Tensor]:
    """A tensor's rows, a few at a time."""
    whole = file.get_slice(name)
    shape = whole.get_shape()
    step = max(1, _PART // (4 * math.prod(shape[1:])))
    for begin in range(0, shape[0], step):
        yield whole[begin : begin + step]


def _started(about: Mapping[str, str]) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode())


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
