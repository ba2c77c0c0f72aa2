"""Real images by name, folder or object: one `load` for all of them."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dsdistill.core.device import resolve_device
from dsdistill.data import hub, imagenet
from dsdistill.data.decode import Resize, Rule, checked_size, shown
from dsdistill.data.folder import Reading, Storage, load_folder, load_listings
from dsdistill.data.normalize import Normalization
from dsdistill.data.read import BadImages, OnBadImage
from dsdistill.data.source import ImageSource
from dsdistill.data.store import ResidentPixels
from dsdistill.data.whitening import whiten
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
        reading: how image files become pixels and where those are kept; `load_listings` of `dsdistill.data.folder`
            takes it. Loaders of images that are no files may leave it alone.
    """

    root: Path
    download: bool = False
    holdout: float = 0.2
    holdout_seed: int = 0
    reading: Reading = Reading()


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
    # Work on distillation has no agreed values for it: those of its training pixels.
    "stl10": _Published(
        "STL10",
        tuple(f"stl10_binary/{split}_{kind}.bin" for split in ("train", "test") for kind in "Xy"),
        Normalization((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
        True,
        ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
    ),
}
# Readers that take split="train" and keep labels and images (N, C, H, W).
_SPLIT_READERS = ("SVHN", "STL10")


@dataclass(frozen=True)
class _Listed:
    """A data set of image files in a layout of its own; ``size`` is the published one where sizes differ."""

    find: Callable[[Path], imagenet.Splits]
    size: tuple[int, int] | None = None


_LISTED = {
    "tiny_imagenet": _Listed(imagenet.tiny_imagenet),
    "imagenette": _Listed(partial(imagenet.fastai, "imagenette"), (128, 128)),
    "imagewoof": _Listed(partial(imagenet.fastai, "imagewoof"), (128, 128)),
    **{f"imagenet_{name}": _Listed(partial(imagenet.subset, name), (128, 128)) for name in imagenet.SUBSETS},
}


def load(
    data: str | Path | ImageSource,
    *,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    resize: Resize = "stretch",
    holdout: float = 0.2,
    holdout_seed: int = 0,
    storage: Storage = "auto",
    on_bad_image: OnBadImage = "error",
    max_skipped: float = 0.05,
    device: str | torch.device | None = "cpu",
    mirror_safe: bool | None = None,
    zca: bool | Literal["unit"] = False,
) -> ImageSource:
    """Open real images as an `ImageSource`.

    CIFAR-10 and CIFAR-100 come as pickles, whose md5 torchvision compares with the published one before it opens
    them; an altered file is refused.

    Args:
        data: a name of `list_datasets` (case, "-" and "_" do not matter), a folder of images (see
            `dsdistill.data.folder.load_folder`), "hf:OWNER/NAME" of the Hugging Face Hub (see `dsdistill.data.hub`),
            or a source. A name wins over a folder of that name: write ./mnist.
        root: folder of the named data sets; default the environment variable DSDISTILL_DATA, else "data".
        download: fetch missing files of a named data set into ``root``.
        image_size: resize the images of a folder to (height, width) pixels, or to a square.
        resize: "stretch" the whole frame to image_size, "crop" its centre or "pad" it with black.
        holdout: share of each class held out where the data have no test split ("digits", some folders).
        holdout_seed: seed of that choice.
        storage: where images of a folder are kept: "memory"; "cache", a file that they are decoded into once (see
            `dsdistill.data.cache`) and read from as they are drawn, after each process has checked it once (about a
            second per GB); "auto", memory up to 1 GiB.
        on_bad_image: "skip" leaves out files of a folder that cannot be decoded and lists them in ``source.skipped``.
        max_skipped: largest share of a split that may be left out.
        device: where to keep the images; None picks the best device. A cache file moves to a GPU if it fills at most
            half of its free memory; else it stays where it is and what is drawn is uploaded.
        mirror_safe: whether a left-right flip keeps the class; None takes what is known of the data.
        zca: whiten the images, fitted now on the training ones: True the standardised images, as DataDAM does, "unit"
            those in [0, 1], as MTT does (see `dsdistill.data.whitening.whiten`).

    Raises:
        UnknownName: no data set and no folder of this name.
        BadData: files are missing or damaged.
        InvalidSetting: an argument out of range, or image_size or storage="cache" for data that do not come in files.
        OutOfSpace: the disk cannot hold the cache.
        DeviceUnavailable: the device is not there.
    """
    place, size = resolve_device(device), checked_size(image_size)
    if not 0 < holdout < 1:
        raise InvalidSetting("holdout", holdout, "the share of each class to hold out, above 0 and below 1")
    if zca not in (True, False, "unit"):
        raise InvalidSetting("zca", zca, "True, False or 'unit'")
    reading = Reading(Rule(size, resize), storage, BadImages(on_bad_image, max_skipped))
    named = _loader(data)
    if isinstance(data, ImageSource):
        source = data
    elif named is not None:
        folder = Path(os.environ.get("DSDISTILL_DATA") or "data") if root is None else Path(root)
        source = named(LoadRequest(folder.expanduser(), download, holdout, holdout_seed, reading))
    else:
        source = load_folder(_folder(data), reading, holdout=holdout, holdout_seed=holdout_seed)
    if size is not None and source.shape[1:] != size:
        height, width = source.shape[1:]
        raise InvalidSetting(
            "image_size", image_size, f"only folders are resized; {source.name} has {height}x{width} pixels"
        )
    if storage == "cache" and isinstance(source.store, ResidentPixels):
        raise InvalidSetting("storage", storage, f"only image files are cached; {source.name} is in memory already")
    if mirror_safe is not None and mirror_safe != source.mirror_safe:
        source = source.with_mirror_safe(mirror_safe)
    source = source.to(place)
    return whiten(source, standardized=zca is True) if zca else source


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
    if data.startswith(hub.PREFIX):
        return partial(_from_hub, data)
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
    if known.reader == "STL10":
        # Its check of files demands the unlabelled images too: 2.6 GB that nothing here reads.
        labelled = [entry for entry in reader.train_list if not entry[0].startswith("unlabeled")]
        reader = type(reader.__name__, (reader,), {"train_list": labelled})
    by_split = known.reader in _SPLIT_READERS
    split: dict[str, Any] = {"split": "train" if train else "test"} if by_split else {"train": train}
    try:
        dataset = reader(root, download=download, **split)
        images = torch.as_tensor(dataset.data)
        targets = torch.as_tensor(dataset.labels if by_split else dataset.targets)
    except Exception as error:
        action = "could not be fetched or read" if download else "are damaged or incomplete"
        mend = "check the network" if download else "delete them and load again with download=True"
        raise BadData(f"{name}: the files in {shown(root.absolute())} {action} ({error}); {mend}") from error
    if images.ndim == 3:
        images = images[:, None]
    elif not by_split:  # torchvision keeps CIFAR as (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    title = name if train else f"{name} (test)"
    return ImageSource(title, known.classes or dataset.classes, images, targets, normalization=known.normalization)


def _listed(name: str, request: LoadRequest) -> ImageSource:
    known, reading = _LISTED[name], request.reading
    if request.download and name == "imagenette":
        imagenet.fetch_imagenette(request.root)
    train, test = known.find(request.root)
    if reading.rule.size is None:
        reading = replace(reading, rule=replace(reading.rule, size=known.size))
    return load_listings(name, name, train, test, reading, normalization=imagenet.NORMALIZATION)


def _from_hub(data: str, request: LoadRequest) -> ImageSource:
    return hub.load_hub(
        data,
        download=request.download,
        rule=request.reading.rule,
        bad_images=request.reading.bad_images,
        holdout=request.holdout,
        holdout_seed=request.holdout_seed,
    )


_LOADERS: dict[str, Loader] = {
    "digits": _digits,
    **{name: partial(_published, name) for name in _PUBLISHED},
    **{name: partial(_listed, name) for name in _LISTED},
}


def published_normalization(name: str) -> Normalization:
    """The statistics that earlier work standardises a named data set with.

    Raises:
        UnknownName: nothing was published for this name.
    """
    tables = {**{known: entry.normalization for known, entry in _PUBLISHED.items()}}
    tables |= dict.fromkeys(_LISTED, imagenet.NORMALIZATION)
    found = {_plain(known): normalization for known, normalization in tables.items()}.get(_plain(name))
    if found is None:
        raise UnknownName("normalization", name, sorted(tables))
    return found
