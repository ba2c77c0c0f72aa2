"""Real images by name, folder or object: one `load` for all of them."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdistill.core.device import resolve_device
from dsdistill.data.decode import checked_size, shown
from dsdistill.data.folder import load_folder
from dsdistill.data.normalize import Normalization
from dsdistill.data.source import ImageSource
from dsdistill.errors import BadData, InvalidSetting, UnknownName

_DIGITS = tuple("0123456789")
_MNIST_FILES = tuple(
    f"raw/{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class LoadRequest:
    """What a loader given to `register_dataset` may need.

    Attributes:
        root: folder that holds downloaded data sets.
        download: whether files may be fetched.
        holdout: share of each class to hold out when the data have no test split.
        holdout_seed: seed of that choice.
    """

    root: Path
    download: bool = False
    holdout: float = 0.2
    holdout_seed: int = 0


Loader = Callable[[LoadRequest], ImageSource]


@dataclass(frozen=True)
class _Published:
    """A data set that torchvision reads, and the statistics published sets are standardised with."""

    reader: str
    files: tuple[str, ...]
    normalization: Normalization
    mirror_safe: bool
    classes: tuple[str, ...] | None = None


# The statistics are those that earlier work on distillation standardises with, so that sets and scores compare;
# the deviations of CIFAR-10 and SVHN are not those of their pixels.
_PUBLISHED = {
    "mnist": _Published(
        "MNIST", tuple(f"MNIST/{file}" for file in _MNIST_FILES), Normalization((0.1307,), (0.3081,)), False, _DIGITS
    ),
    "fashion_mnist": _Published(
        "FashionMNIST",
        tuple(f"FashionMNIST/{file}" for file in _MNIST_FILES),
        Normalization((0.2861,), (0.3530,)),
        True,
    ),
    "svhn": _Published(
        "SVHN",
        ("train_32x32.mat", "test_32x32.mat"),
        Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        False,
        _DIGITS,
    ),
    "cifar10": _Published(
        "CIFAR10",
        ("cifar-10-batches-py",),
        Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        True,
    ),
    "cifar100": _Published(
        "CIFAR100",
        ("cifar-100-python",),
        Normalization((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
        True,
    ),
}


def load(
    data: str | Path | ImageSource,
    *,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    holdout: float = 0.2,
    holdout_seed: int = 0,
    device: str | torch.device | None = "cpu",
    mirror_safe: bool | None = None,
) -> ImageSource:
    """Open real images as an `ImageSource`.

    CIFAR-10 and CIFAR-100 come as pickles, whose md5 torchvision compares with the published one before it opens
    them; an altered file is refused.

    Args:
        data: a name of `list_datasets` (case, "-" and "_" do not matter), a folder of images (see
            `dsdistill.data.folder.load_folder`), or a source. A name wins over a folder of that name: write ./mnist.
        root: folder of the named data sets; default the environment variable DSDISTILL_DATA, else "data".
        download: fetch missing files of a named data set into ``root``.
        image_size: resize the images of a folder to (height, width) pixels, or to a square.
        holdout: share of each class held out where the data have no test split ("digits", some folders).
        holdout_seed: seed of that choice.
        device: where to keep the images; None picks the best device.
        mirror_safe: whether a left-right flip keeps the class; None takes what is known of the data.

    Raises:
        UnknownName: no data set and no folder of this name.
        BadData: files are missing or damaged.
        InvalidSetting: an argument out of range, or image_size for data of another fixed size.
        DeviceUnavailable: the device is not there.
    """
    place, size = resolve_device(device), checked_size(image_size)
    if not 0 < holdout < 1:
        raise InvalidSetting("holdout", holdout, "the share of each class to hold out, above 0 and below 1")
    named = _loader(data)
    if isinstance(data, ImageSource):
        source = data
    elif named is not None:
        folder = Path(os.environ.get("DSDISTILL_DATA") or "data") if root is None else Path(root)
        source = named(LoadRequest(folder.expanduser(), download, holdout, holdout_seed))
    else:
        source = load_folder(_folder(data), image_size=size, holdout=holdout, holdout_seed=holdout_seed)
    if size is not None and source.shape[1:] != size:
        height, width = source.shape[1:]
        raise InvalidSetting(
            "image_size", image_size, f"only folders are resized; {source.name} has {height}x{width} pixels"
        )
    if mirror_safe is not None and mirror_safe != source.mirror_safe:
        source = source.with_mirror_safe(mirror_safe)
    return source.to(place)


def list_datasets() -> list[str]:
    """Names that `load` knows, sorted."""
    return sorted(_LOADERS)


def register_dataset(name: str, loader: Loader) -> None:
    """Make `load` know another data set.

    Args:
        name: lower-case letters, digits and "_"; must be new.
        loader: gets a `LoadRequest` and returns a source; called at each `load`.

    Raises:
        InvalidSetting: the name is taken or has other characters.
    """
    if not name or name != name.lower() or not name.replace("_", "").isalnum():
        raise InvalidSetting("name", name, "use lower-case letters, digits and '_'")
    if _plain(name) in {_plain(known) for known in _LOADERS}:
        raise InvalidSetting("name", name, f"is taken; the data sets are {', '.join(list_datasets())}")
    _LOADERS[name] = loader


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _loader(data: Any) -> Loader | None:
    if not isinstance(data, str):
        return None
    return {_plain(name): loader for name, loader in _LOADERS.items()}.get(_plain(data))


def _folder(data: Any) -> Path:
    if not isinstance(data, (str, Path)) or not str(data):
        raise InvalidSetting("data", data, "give a data set name, the path of an image folder, or an ImageSource")
    path = Path(data).expanduser()
    if path.exists():
        return path
    text = str(data)
    if isinstance(data, Path) or os.sep in text or "/" in text or text.startswith((".", "~")):
        raise BadData(
            f"{shown(path)}: no such folder; check the path (data sets by name: {', '.join(list_datasets())})"
        )
    raise UnknownName("dataset", text, list_datasets(), "The path of an existing image folder works too.")


def _digits(request: LoadRequest) -> ImageSource:
    """The 1797 grey 8 x 8 digits that come with scikit-learn: values 0..16 scaled to 0..255."""
    bunch: Any = importlib.import_module("sklearn.datasets").load_digits()  # here: importing it takes a second
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    everything = ImageSource("digits", _DIGITS, pixels, torch.from_numpy(bunch.target.astype(np.int64)))
    fit, held = everything.split(request.holdout, torch.Generator().manual_seed(request.holdout_seed))
    return ImageSource("digits", _DIGITS, fit.images, fit.targets, mirror_safe=False, open_test=_Kept(held))


@dataclass(frozen=True, eq=False)
class _Kept:
    """Opens a source that is there already."""

    source: ImageSource

    def __call__(self) -> ImageSource:
        return self.source


def _published(name: str, request: LoadRequest) -> ImageSource:
    known = _PUBLISHED[name]
    absent = [file for file in known.files if not (request.root / file).exists()]
    if absent and not request.download:
        raise BadData(
            f"{name}: {', '.join(absent)} not found in {shown(request.root.absolute())}; fetch the files with "
            "download=True (--load.download true), or point root or DSDISTILL_DATA to them"
        )
    test = partial(_read_published, name, request.root, False, False)
    train = _read_published(name, request.root, True, request.download)
    if absent and not all((request.root / file).exists() for file in known.files):
        # SVHN fetches one split at a time: get the other now, while there is a network, not after a long run.
        _read_published(name, request.root, False, True)
    return ImageSource(
        name,
        train.classes,
        train.images,
        train.targets,
        normalization=known.normalization,
        mirror_safe=known.mirror_safe,
        open_test=test,
    )


def _read_published(name: str, root: Path, train: bool, download: bool) -> ImageSource:
    """One split as torchvision reads it, uint8 (N, C, H, W)."""
    known = _PUBLISHED[name]
    reader: Any = getattr(importlib.import_module("torchvision.datasets"), known.reader)
    if hasattr(reader, "_check_legacy_exist"):
        # Else torchvision prefers pickled tensors of an old version, unverified, to the raw files.
        reader = type(reader.__name__, (reader,), {"_check_legacy_exist": lambda _: False})
    split: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        dataset = reader(root, download=download, **split)
        images = torch.as_tensor(dataset.data)
        targets = torch.as_tensor(dataset.labels if name == "svhn" else dataset.targets)
    except Exception as error:
        action = "could not be fetched or read" if download else "are damaged or incomplete"
        mend = "check the network" if download else "delete them and load again with download=True"
        raise BadData(f"{name}: the files in {shown(root.absolute())} {action} ({error}); {mend}") from error
    if images.ndim == 3:
        images = images[:, None]
    elif name != "svhn":  # torchvision keeps CIFAR as (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    title = name if train else f"{name} (test)"
    return ImageSource(title, known.classes or dataset.classes, images, targets, normalization=known.normalization)


_LOADERS: dict[str, Loader] = {"digits": _digits, **{name: partial(_published, name) for name in _PUBLISHED}}
