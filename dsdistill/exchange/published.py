"""Reading the ``.pt`` files that papers publish: loose tensors, lists of them, or a dict of results.

Read with ``weights_only=True``: nothing in such a file is ever executed. Scores that the authors left in theirs as
numpy values are passed over.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsdistill.errors import BadArtifact, BadData, InvalidSetting

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_IMAGES, _LABELS = ("images", "image", "image_syn", "data", "x"), ("labels", "label", "label_syn", "targets", "y")


class Published(NamedTuple):
    """Images (N, C, H, W) float32, targets (N,) int64 or (N, K) float32, and a learned step size where there is one."""

    images: Tensor
    targets: Tensor
    lr: Tensor | None


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
    path: Path, labels: Path | None = None, lr: Path | None = None, *, which: int = 0, num_classes: int | None = None
) -> Published:
    """Tensors of a published set.

    Understood are: a tensor of images (labels in a second file, or class-major in equal numbers); a pair of images and
    labels; a list of such pairs, or a dict with it under "data" (DC, DSA, DM, DataDAM: one pair for each experiment); a
    dict of named tensors. A folder stands for its ``images.pt``, ``labels.pt`` and ``lr.pt`` (or MTT's ``*_best.pt``).

    Args:
        path: file or folder.
        labels: file of the labels.
        lr: file of a learned step size.
        which: which pair to take of several, counted from 0.
        num_classes: K, needed where labels must be inferred from the order.

    Raises:
        BadArtifact: not readable without executing code, or damaged.
        BadData: no images or labels that fit together.
        InvalidSetting: ``which`` is out of range.
    """
    if path.is_dir():
        path, labels, lr = _of_folder(path, labels, lr)
    content = _read(path)
    images, targets = _pair(path, content, which)
    if labels is not None:
        targets = _tensor(labels, _read(labels))
    if targets is None:
        targets = _class_major(path, len(images), num_classes)
    step = _tensor(lr, _read(lr)) if lr is not None else None
    return _checked(path, images, targets, step)


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


def _pair(path: Path, content: Any, which: int) -> tuple[Tensor, Tensor | None]:
    """Images and, where the content has them, labels."""
    if isinstance(content, Tensor):
        return content, None
    if isinstance(content, Mapping):
        if isinstance(content.get("data"), (list, tuple)):
            return _pair(path, content["data"], which)
        images = next((content[name] for name in _IMAGES if isinstance(content.get(name), Tensor)), None)
        targets = next((content[name] for name in _LABELS if isinstance(content.get(name), Tensor)), None)
        if images is None:
            keys = ", ".join(repr(key) for key in list(content)[:8])
            raise BadData(f"{path}: no images under any of {', '.join(_IMAGES)}; it holds {keys}")
        return images, targets
    if isinstance(content, Sequence) and content and all(isinstance(part, Tensor) for part in content):
        if content[0].dim() == 4 and len(content) <= 3 and (len(content) == 1 or content[1].dim() <= 2):
            return content[0], content[1] if len(content) > 1 else None
        if all(part.dim() == 3 for part in content):
            return torch.stack(list(content)), None
    if isinstance(content, Sequence) and content and all(isinstance(part, (list, tuple)) for part in content):
        if not -len(content) <= which < len(content):
            raise InvalidSetting("which", which, f"{path} holds {len(content)} sets, 0 to {len(content) - 1}")
        return _pair(path, content[which], 0)
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
