"""Any map-style dataset of PyTorch as an `ImageSource`."""

import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsdistill.core.device import resolve_device
from dsdistill.data.checks import known_labels, require_same_classes, warn_of_one_class
from dsdistill.data.decode import to_pixels
from dsdistill.data.normalize import Normalization
from dsdistill.data.read import allocate
from dsdistill.data.source import ImageSource
from dsdistill.errors import BadData, ShapeMismatch


def from_dataset(
    train: Any,
    test: Any = None,
    *,
    classes: Sequence[str] | None = None,
    name: str = "custom",
    mirror_safe: bool = True,
    normalization: Normalization | None = None,
    device: str | torch.device | None = "cpu",
) -> ImageSource:
    """Read a map-style ``torch.utils.data.Dataset`` once and keep it as uint8.

    An item is (image, label). The image is a Pillow image, a tensor (C, H, W) or (H, W), or an array (H, W, C)
    or (H, W); tensors and arrays are uint8, or float in [0, 1], which is rounded to 8 bits. The label is an int.
    All images must have one shape. The test split is read when it is first used, except for its first item, which is
    compared with the train split at once.

    Args:
        train: has ``len`` and ``[i]``; give it without augmentation and without Normalize.
        test: the same for the test split, or None.
        classes: class names by label; else the ``classes`` of ``train``, else "0", "1", ... up to the largest label.
        mirror_safe: False when a left-right flip may change the class.
        normalization: measured on ``train`` when None.
        device: where to keep the images; None picks the best device.

    Raises:
        BadData: no map-style dataset, no items, an unsuitable image or label; names the item.
        ShapeMismatch: the first test image has another shape than the training images.
        DeviceUnavailable: the device is not there.
    """
    place = resolve_device(device)
    names = _class_names(train) if classes is None else tuple(str(title) for title in classes)
    images, targets = _read(f"{name} (train)", train)
    if names is None:
        names = tuple(str(label) for label in range(int(targets.max()) + 1))
    _check_labels(f"{name} (train)", targets, names)
    opener = None
    if test is not None:
        # Now rather than after a long run: the names are at hand, and one image shows what most mistakes do to all.
        _require_items(f"{name} (test)", test)
        require_same_classes(name, names, (_class_names(test) if classes is None else None) or names)
        _check_first(f"{name} (test)", test, tuple(images.shape[1:]), names)
        opener = partial(_open_test, f"{name} (test)", test, names)
    warn_of_one_class(name, names)
    source = ImageSource(
        name, names, images, targets, normalization=normalization, mirror_safe=mirror_safe, open_test=opener
    )
    return source.to(place)


def _open_test(name: str, test: Any, classes: tuple[str, ...]) -> ImageSource:
    images, targets = _read(name, test)
    _check_labels(name, targets, classes)
    return ImageSource(name, classes, images, targets)


def _read(name: str, dataset: Any) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,)."""
    count = _require_items(name, dataset)
    images: Tensor | None = None
    labels: list[int] = []
    shapes: dict[tuple[int, ...], int] = {}
    for index in range(count):
        image, label = _item(name, dataset, index)
        labels.append(label)
        shapes[tuple(image.shape)] = shapes.get(tuple(image.shape), 0) + 1
        if images is None:  # one block from the start: a list to be stacked would take the memory twice
            images = torch.from_numpy(allocate(name, (count, *image.shape)))
        if images.shape[1:] == image.shape:
            images[index] = image
    if images is None or len(shapes) > 1:
        listing = ", ".join(f"{shape} ({times})" for shape, times in list(shapes.items())[:5])
        raise BadData(
            f"{name}: images have {len(shapes)} shapes (C, H, W): {listing}; resize and convert them to one "
            "shape in the dataset's transform"
        )
    return images, torch.tensor(labels)


def _item(name: str, dataset: Any, index: int) -> tuple[Tensor, int]:
    """Image uint8 (C, H, W) and label."""
    where = f"{name}, item {index}"
    try:
        item = dataset[index]
    except Exception as error:
        raise BadData(f"{where}: reading it failed ({type(error).__name__}: {error})") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise BadData(f"{where}: expected (image, label), got {type(item).__name__}")
    return _image(where, item[0]), _label(where, item[1])


def _check_first(name: str, dataset: Any, shape: tuple[int, ...], classes: tuple[str, ...]) -> None:
    image, label = _item(name, dataset, 0)
    if tuple(image.shape) != shape:
        raise ShapeMismatch(f"{name}, item 0: an image", tuple(image.shape), f"{shape} as in the train split")
    _check_labels(name, torch.tensor([label]), classes)


def _require_items(name: str, dataset: Any) -> int:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise BadData(f"{name}: a {type(dataset).__name__} is no map-style dataset; it needs len() and [index]")
    if len(dataset) == 0:
        raise BadData(f"{name}: the dataset has no items")
    return len(dataset)


def _image(where: str, image: Any) -> Tensor:
    """uint8 (C, H, W)."""
    if isinstance(image, Image.Image):
        try:
            pixels = torch.from_numpy(to_pixels(image).copy())
        except ValueError as error:
            raise BadData(f"{where}: {error}") from None
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uf":
            raise BadData(f"{where}: an array of {image.dtype}; give uint8 (0..255) or float (0..1)")
        image = torch.from_numpy(image.copy())
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    elif isinstance(image, Tensor) and image.ndim == 3 and image.shape[2] in (1, 3, 4) and min(image.shape[:2]) > 4:
        raise BadData(
            f"{where}: a tensor of shape {tuple(image.shape)} looks like (H, W, C); give (C, H, W), "
            "as .permute(2, 0, 1) makes it"
        )
    if not isinstance(image, Tensor):
        raise BadData(f"{where}: an image of type {type(image).__name__}; give a Pillow image, a tensor or an array")
    if image.ndim not in (2, 3) or image.numel() == 0:
        raise BadData(f"{where}: an image of shape {tuple(image.shape)}; give (C, H, W) or (H, W)")
    return _bytes(where, image.detach().cpu()[None] if image.ndim == 2 else image.detach().cpu()).contiguous()


def _bytes(where: str, image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise BadData(f"{where}: pixels have dtype {image.dtype}; give uint8 (0..255) or float (0..1)")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise BadData(
            f"{where}: float pixels reach from {low:.4g} to {high:.4g}, expected 0 to 1; drop the Normalize "
            "transform, standardisation is done here"
        )
    return (image * 255).round().to(torch.uint8)


def _label(where: str, label: Any) -> int:
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, (bool, np.bool_)) or not isinstance(label, numbers.Integral):
        raise BadData(f"{where}: label {label!r} is no int; map labels to 0, 1, 2, ...")
    if label < 0:
        raise BadData(f"{where}: label {int(label)} is negative; map labels to 0, 1, 2, ...")
    return int(label)


def _check_labels(name: str, targets: Tensor, classes: tuple[str, ...]) -> None:
    beyond = (targets >= len(classes)).nonzero().flatten().tolist()
    if beyond:
        raise BadData(f"{name}, item {beyond[0]}: label {int(targets[beyond[0]])} has no name; {known_labels(classes)}")


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The ``classes`` of a dataset, or of the one it is a part of (``torch.utils.data.Subset``)."""
    while dataset is not None:
        names = getattr(dataset, "classes", None)
        if names is not None:
            return tuple(str(title) for title in names)
        dataset = getattr(dataset, "dataset", None)
    return None
