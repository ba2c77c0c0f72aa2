"""Checkpoints of a `State`: a folder per step, whole or absent, the last few kept, damage noticed.

A step folder holds ``state.safetensors`` and ``state.json`` (sealed, with the sha256 of the tensors). It is
written under a temporary name, flushed and renamed, so a reader never meets half of one.
"""

import copy
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdistill.core import storage
from dsdistill.core.device import is_out_of_memory
from dsdistill.engine.synthesizer import State
from dsdistill.errors import BadArtifact, BadData

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
    """Put a captured tree back into a state of the same make; the tree stays as it is, to be restored again.

    Raises:
        BadData: the tree is that of a state of another make; the state may hold parts of it then.
    """
    tree = copy.deepcopy(dict(tree))  # optimizers, and maybe extras, keep the tensors they are given and change them
    try:
        state.images.load_state_dict(tree["images"])
        state.labels.load_state_dict(tree["labels"])
        _same_names("optimizers", state.optimizers, tree["optimizers"])
        for name, optimizer in state.optimizers.items():
            optimizer.load_state_dict(tree["optimizers"][name])
        _same_names("extras", state.extras, tree["extras"])
        for name, extra in state.extras.items():
            if isinstance(extra, Tensor):
                _restore_tensor(name, extra, tree["extras"][name])
            else:
                extra.load_state_dict(tree["extras"][name])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # of torch: any of these
        if is_out_of_memory(error):
            raise
        raise BadData(f"the saved state is of another make than this method's ({_one_line(error)})") from error


def all_finite(state: State) -> bool:
    """Whether every floating-point tensor of images, labels, optimizers and extras is finite; one read of the device.

    What is not finite could not be read back: `storage.read_listed_tensors` refuses it.
    """
    stateful = (state.images, state.labels, *state.optimizers.values(), *state.extras.values())
    content = [_content(part) for part in stateful]
    tensors, _ = storage.flatten(_plain(content))
    checks = [torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()]
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())


def write(folder: Path, iteration: int, tree: Mapping[str, Any], keep: int) -> None:
    """Commit a checkpoint after ``iteration`` finished steps and drop all but the newest ``keep``.

    Raises:
        OutOfSpace: the disk is full; the checkpoints that were there are untouched.
    """
    tensors, skeleton = storage.flatten(tree)
    data = storage.encode_tensors(tensors)
    meta = {"schema_version": SCHEMA_VERSION, "iteration": iteration, "state": skeleton}
    final = folder / f"step_{iteration:09d}"
    temporary = folder / (final.name + _TEMPORARY)
    for leftover in (*folder.glob(f"step_*{_TEMPORARY}"), final):  # abandoned tries, or a copy found damaged
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        with storage.space_for(temporary, len(data)):
            temporary.mkdir(parents=True)
            storage.write_folder(temporary, {_TENSORS: data}, _META, meta)
            temporary.rename(final)
            storage.fsync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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
    try:
        iteration, tree = meta["iteration"], storage.unflatten(tensors, meta["state"])
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadArtifact(step, f"does not describe a state ({error!r})") from None
    if type(iteration) is not int or iteration < 0 or not isinstance(tree, dict):
        raise BadArtifact(step, f"does not describe a state after a number of steps (iteration {iteration!r})")
    return iteration, tree


def clear(folder: Path) -> None:
    """Remove all checkpoints of a job."""
    for step in folder.glob("step_*"):
        shutil.rmtree(step, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.suffix != _TEMPORARY)


def _same_names(what: str, mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if set(mine) != set(saved):
        raise ValueError(f"{what} {sorted(saved)} where there are {sorted(mine)}")


def _restore_tensor(name: str, extra: Tensor, saved: Tensor) -> None:
    if extra.shape != saved.shape:  # copy_ would repeat a smaller one
        raise ValueError(f"extra {name!r} has shape {tuple(saved.shape)}, expected {tuple(extra.shape)}")
    extra.copy_(saved)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) if str(error) else type(error).__name__


def _content(extra: Any) -> Any:
    return extra if isinstance(extra, Tensor) else extra.state_dict()


def _plain(tree: Any) -> Any:
    # state_dict() gives OrderedDicts; storage.flatten names a container by its type
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(value) for value in tree)
    return tree
