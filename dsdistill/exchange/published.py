"""Reading the ``.pt`` files that papers publish: loose tensors, lists of them, or a dict of results.

Read with ``weights_only=True``: nothing in such a file is ever executed. Scores that the authors left in theirs as
numpy values are passed over.
"""

import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsdistill.errors import BadArtifact, BadData, InvalidSetting

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_IMAGES = ("images", "image", "image_syn", "data", "x")
_LABELS = ("labels", "label", "label_syn", "targets", "target", "y")


class Published(NamedTuple):
    """Images (N, C, H, W) float32, targets (N,) int64 or (N, K) float32, and a learned step size where there is one."""

    images: Tensor
    targets: Tensor
    lr: Tensor | None


class _Found(NamedTuple):
    """What one file holds. ``ordered``: labels that are absent may be inferred from the order."""

    images: Tensor
    targets: Tensor | None = None
    lr: Tensor | None = None
    ordered: bool = False


class _Forgotten:
    """Stands in for numpy values, so that no code of numpy runs on what the file says."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Forgotten, f"numpy{place}")
    for place in (
        ".dtype",
        ".ndarray",
        *(f".{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    )
]


def read_published(
    path: Path,
    labels: Path | None = None,
    lr: Path | None = None,
    *,
    which: int | None = None,
    num_classes: int | None = None,
) -> Published:
    """Tensors of a published set.

    Understood are: a tensor of images, or a list of them (labels in a second file, or class-major in equal numbers);
    images and labels, and perhaps a step size (IDC, NCFM); a list of such pairs, or a dict with it under "data" (DC,
    DSA, DM: one for each experiment; DataDAM: one for each evaluated step, the first before any); a dict of named
    tensors. A folder stands for its ``images.pt``, ``labels.pt`` and ``lr.pt`` (or MTT's ``*_best.pt``).

    Args:
        path: file or folder.
        labels: file of the labels.
        lr: file of a learned step size.
        which: which pair to take, counted from 0; must be said where there are several.
        num_classes: K, needed where labels must be inferred from the order.

    Raises:
        BadArtifact: not readable without executing code, or damaged.
        BadData: no images or labels that fit together.
        InvalidSetting: ``which`` is out of range, or not said.
    """
    if os.path.isdir(path):
        path, labels, lr = _of_folder(path, labels, lr)
    content = _read(path)
    found = _pair(path, content, which)
    targets = _tensor(labels, _read(labels)) if labels is not None else found.targets
    if targets is None:
        if not found.ordered:
            held = ", ".join(map(repr, content)) if isinstance(content, Mapping) else type(content).__name__
            raise BadData(f"{path}: no labels under any of {', '.join(_LABELS)} (it holds {held}); name their file")
        targets = _class_major(path, len(found.images), num_classes)
    step = _tensor(lr, _read(lr)) if lr is not None else found.lr
    return _checked(path, found.images, targets, step)


def _of_folder(folder: Path, labels: Path | None, lr: Path | None) -> tuple[Path, Path | None, Path | None]:
    def find(stem: str) -> Path | None:
        return next((p for name in (stem, f"{stem}_best") if (p := folder / f"{name}.pt").is_file()), None)

    images = find("images")
    if images is None:
        raise BadArtifact(folder, "holds no images.pt or images_best.pt; name the file itself")
    return images, labels or find("labels"), lr or find("lr")


def _read(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on unusual pickles: they are read or refused, nothing else matters here
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadArtifact(path, "no such file; check the path") from None
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "error" in line.lower()), ""
        )
        raise BadArtifact(
            path,
            f"cannot be read without executing code ({reason.strip() or 'not a file of tensors'}), which is never "
            "done; load it where you trust it and save its tensors alone",
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadArtifact(
            path, f"not a readable .pt file ({type(error).__name__}: {error}); get a fresh copy"
        ) from None


def _pair(path: Path, content: Any, which: int | None) -> _Found:
    if isinstance(content, Tensor):
        return _Found(content, ordered=True)
    if isinstance(content, Mapping):
        if isinstance(content.get("data"), (list, tuple)):
            return _pair(path, content["data"], which)
        images = next((content[name] for name in _IMAGES if isinstance(content.get(name), Tensor)), None)
        targets = next((content[name] for name in _LABELS if isinstance(content.get(name), Tensor)), None)
        if images is None:
            keys = ", ".join(repr(key) for key in list(content)[:8])
            raise BadData(f"{path}: no images under any of {', '.join(_IMAGES)}; it holds {keys}")
        return _Found(images, targets, ordered=len(content) == 1)
    if isinstance(content, Sequence) and content and all(isinstance(part, Tensor) for part in content):
        if all(part.dim() == 3 for part in content):
            return _Found(torch.stack(list(content)), ordered=True)
        images, *others = content
        step = others[1] if len(others) == 2 and others[1].numel() == 1 else None
        if images.dim() == 4 and len(others) - (step is not None) <= 1:
            return _Found(images, others[0] if others else None, step, ordered=not others)
    if isinstance(content, Sequence) and content and all(isinstance(part, (list, tuple)) for part in content):
        if len(content) > 1 and which is None:
            raise InvalidSetting(
                "which",
                which,
                f"{path} holds {len(content)} sets, 0 to {len(content) - 1}: say which (DC, DSA and DM write one for "
                "each experiment, DataDAM one for each evaluated step, the first before any)",
            )
        if not -len(content) <= (which or 0) < len(content):
            raise InvalidSetting("which", which, f"{path} holds {len(content)} sets, 0 to {len(content) - 1}")
        return _pair(path, content[which or 0], None)
    raise BadData(f"{path}: holds {type(content).__name__}; expected images, or images with labels")


def _tensor(path: Path, content: Any) -> Tensor:
    if not isinstance(content, Tensor):
        raise BadData(f"{path}: holds {type(content).__name__}, expected one tensor")
    return content


def _class_major(path: Path, count: int, num_classes: int | None) -> Tensor:
    if num_classes is None or count % num_classes:
        known = (
            "the number of classes is not known" if num_classes is None else f"{num_classes} classes do not divide it"
        )
        raise BadData(f"{path}: {count} images without labels, and {known}; name the file of the labels")
    return torch.arange(num_classes).repeat_interleave(count // num_classes)


def _checked(path: Path, images: Tensor, targets: Tensor, lr: Tensor | None) -> Published:
    for tensor in (images, targets, *([] if lr is None else [lr])):
        # A small file can claim a tensor of any size by a stride of 0.
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise BadData(f"{path}: a tensor {tuple(tensor.shape)} is not all there (no plain values, or too few)")
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise BadData(f"{path}: images are {tuple(images.shape)} {images.dtype}; expected (N, C, H, W) floats")
    images = images.detach().float()
    if not bool(torch.isfinite(images).all()):
        raise BadData(f"{path}: images hold NaN or infinity")
    if targets.dim() == 1 and targets.is_floating_point() and bool((targets == targets.round()).all()):
        targets = targets.to(torch.int64)
    hard = targets.dim() == 1 and targets.dtype in _INTEGERS
    if len(targets) != len(images) or not (hard or (targets.dim() == 2 and targets.is_floating_point())):
        raise BadData(
            f"{path}: labels are {tuple(targets.shape)} {targets.dtype} for {len(images)} images; "
            "expected (N,) classes or (N, K) floats"
        )
    return Published(images, targets.detach().to(torch.int64 if hard else torch.float32), lr)
