"""Checkpoints of a `State`: a folder per step, whole or absent, the last few kept, damage noticed.

A step folder holds ``state.safetensors`` and ``state.json`` (sealed, with the sha256 of the tensors). It is
written under a temporary name, flushed and renamed, so a reader never meets half of one.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdistill.core import storage
from dsdistill.engine.synthesizer import State
from dsdistill.errors import BadArtifact

logger = logging.getLogger("dsdistill")
_META, _TENSORS, _TEMPORARY = "state.json", "state.safetensors", ".tmp"
SCHEMA_VERSION = 1


def capture(state: State) -> dict[str, Any]:
    """A detached copy of everything in ``state``, as plain containers and tensors."""
    tree = {
        "images": state.images.state_dict(),
        "labels": state.labels.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "extras": {name: _content(extra) for name, extra in state.extras.items()},
    }
    tensors, skeleton = storage.flatten(_plain(tree))
    return storage.unflatten({name: tensor.detach().clone() for name, tensor in tensors.items()}, skeleton)  # type: ignore[no-any-return]


def nbytes(state: State) -> int:
    """Bytes of a checkpoint of ``state``; an optimiser that has made no step yet counts as two moments per value."""
    content = [state.images.state_dict(), state.labels.state_dict(), *map(_content, state.extras.values())]
    for optimizer in state.optimizers.values():
        values = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        content.append(optimizer.state_dict() if optimizer.state else [*values, *values])
    tensors, _ = storage.flatten(_plain(content))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def restore(state: State, tree: Mapping[str, Any]) -> None:
    """Put a captured tree back into a state of the same make."""
    state.images.load_state_dict(tree["images"])
    state.labels.load_state_dict(tree["labels"])
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict(tree["optimizers"][name])
    for name, extra in state.extras.items():
        if isinstance(extra, Tensor):
            extra.copy_(tree["extras"][name])
        else:
            extra.load_state_dict(tree["extras"][name])


def all_finite(state: State) -> bool:
    """Whether every floating-point tensor of images, labels and extras is finite; one read of the device."""
    content = [state.images.state_dict(), state.labels.state_dict(), *map(_content, state.extras.values())]
    tensors, _ = storage.flatten(_plain(content))
    checks = [torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()]
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())


def write(folder: Path, iteration: int, tree: Mapping[str, Any], keep: int) -> None:
    """Commit a checkpoint after ``iteration`` finished steps and drop all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, skeleton = storage.flatten(tree)
    final = folder / f"step_{iteration:09d}"
    temporary = folder / (final.name + _TEMPORARY)
    for leftover in (temporary, final):  # an abandoned try, or a copy that was found damaged
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    meta = {"schema_version": SCHEMA_VERSION, "iteration": iteration, "state": skeleton}
    storage.write_folder(temporary, {_TENSORS: storage.encode_tensors(tensors)}, _META, meta)
    temporary.rename(final)
    storage.fsync_folder(folder)
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole (iterations done, captured tree on the CPU), or None where there is none.

    Raises:
        BadArtifact: checkpoints exist, but every one of them is damaged.
    """
    steps = _steps(folder)
    for step in reversed(steps):
        try:
            return read(step)
        except BadArtifact as error:
            problem = error
            logger.warning("checkpoint %s is discarded: %s", step.name, error)
    if steps:
        raise BadArtifact(folder, f"no checkpoint is usable ({problem}); --overwrite starts the run afresh")
    return None


def read(step: Path) -> tuple[int, dict[str, Any]]:
    """One checkpoint: finished iterations, captured tree on the CPU.

    Raises:
        BadArtifact: incomplete, damaged, or of another version.
    """
    meta = storage.read_manifest(step / _META)
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise BadArtifact(step, f"schema version {meta.get('schema_version')} is not {SCHEMA_VERSION}")
    tensors = storage.read_listed_tensors(step, meta, _TENSORS)
    return meta["iteration"], storage.unflatten(tensors, meta["state"])


def clear(folder: Path) -> None:
    """Remove all checkpoints of a job."""
    for step in folder.glob("step_*"):
        shutil.rmtree(step, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.suffix != _TEMPORARY)


def _content(extra: Any) -> Any:
    return extra if isinstance(extra, Tensor) else extra.state_dict()


def _plain(tree: Any) -> Any:
    # state_dict() gives OrderedDicts; storage.flatten names a container by its type
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(value) for value in tree)
    return tree
