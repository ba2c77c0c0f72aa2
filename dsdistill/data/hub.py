"""Datasets of the Hugging Face Hub as an `ImageSource`; needs the extra ``hub``.

``load("hf:OWNER/NAME")`` reads what the package ``datasets`` has in its cache; the network is used with
``download=True`` alone, and not even then where HF_HUB_OFFLINE is set. No code of a dataset is ever run.
"""

import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor

from dsdistill.core.device import resolve_device
from dsdistill.data.checks import require_same_classes, some, warn_of_one_class
from dsdistill.data.decode import Pixels, Resize, Rule, checked_size, decode, read_bytes, shown
from dsdistill.data.normalize import Normalization
from dsdistill.data.read import BadImages, OnBadImage, Shapes, allocate
from dsdistill.data.source import ImageSource, Skipped
from dsdistill.errors import BadData, InvalidSetting, MissingExtra

logger = logging.getLogger("dsdistill")

PREFIX = "hf:"
_TEST_SPLITS = ("test", "validation", "valid", "val")
_ROWS = 256


@dataclass(frozen=True)
class HubName:
    """What ``hf:OWNER/NAME:CONFIG?train=SPLIT&test=SPLIT&image=COLUMN&label=COLUMN`` asks for; see `parse`."""

    repository: str
    config: str | None = None
    train: str = "train"
    test: str | None = None
    image: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read the text after "hf:"; everything but the repository may be left out.

        Raises:
            InvalidSetting: no repository, or an unknown, empty or repeated option.
        """
        head, _, tail = text.removeprefix(PREFIX).partition("?")
        repository, colon, config = head.partition(":")
        form = "hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, and options ?train=SPLIT&test=SPLIT&image=COLUMN&label=COLUMN"
        owner, _, name = repository.rpartition("/")
        # A dataset with a path for a name would be read from this machine, one of another form not at all.
        if not name or name in (".", "..") or owner in (".", "..", "~") or "/" in owner or repository[0] == "/":
            raise InvalidSetting("data", text, f"give {form}")
        options = parse_qsl(tail, keep_blank_values=True)
        known = ("train", "test", "image", "label")
        chosen = dict(options)
        unfit = len(chosen) != len(options) or (bool(tail) and not options) or not all(chosen.values())
        if unfit or not set(chosen) <= set(known) or (colon and not config):
            raise InvalidSetting("data", text, f"give {form}, each option once")
        return cls(repository, config or None, **chosen)


@dataclass(frozen=True)
class _Columns:
    """Where a split keeps images and labels; class names where the label column has them."""

    image: str
    label: str
    classes: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads splits of one dataset in one way."""

    columns: _Columns
    rule: Rule
    bad_images: BadImages

    def read(self, title: str, split: Any, channels: int | None = None) -> tuple[Tensor, Tensor, tuple[Skipped, ...]]:
        """Images uint8 (M, C, H, W), labels int64 (M,) and what was left out; ``channels`` 1 refuses colour."""
        pixels: dict[Path, Pixels] = {}
        targets: list[int] = []
        bad: list[Skipped] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start, rows in self._batches(split):
                places = [Path(f"{title}, item {start + row}") for row in range(len(rows[self.columns.label]))]
                decoded = pool.map(self._decode, places, rows[self.columns.image])
                for place, image, label in zip(places, decoded, rows[self.columns.label], strict=True):
                    if isinstance(image, Skipped):
                        bad.append(image)
                    else:
                        pixels[place] = image
                        targets.append(_label(place, label))
                if self.bad_images.action == "error":
                    self.bad_images.judge(title, bad, len(split))
        skipped = self.bad_images.judge(title, bad, len(split))
        return _stacked(title, pixels, channels), torch.tensor(targets), skipped

    def open_test(self, name: str, split: Any, classes: tuple[str, ...], channels: int) -> ImageSource:
        title = f"{name} (test)"
        images, targets, skipped = self.read(title, split, channels)
        return ImageSource(title, classes, images, targets, skipped=skipped)

    def _batches(self, split: Any) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        image = importlib.import_module("datasets").Image(decode=False)
        plain = split.with_format(None).select_columns([self.columns.image, self.columns.label])
        encoded = plain.cast_column(self.columns.image, image)
        for start in range(0, len(encoded), _ROWS):
            yield start, encoded[start : start + _ROWS]

    def _decode(self, where: Path, image: Any) -> Pixels | Skipped:
        if not isinstance(image, Mapping) or (image.get("bytes") is None and not image.get("path")):
            return Skipped(where, "has no image; remove the row")
        try:
            content = image.get("bytes")
            content = read_bytes(Path(image["path"])) if content is None else content
            # Decoded here and not by datasets: one rule for pixels, and no exotic decoders.
            return decode(where, content, self.rule)
        except BadData as error:
            return Skipped(where, str(error).removeprefix(f"{shown(where)}: "))


def load_hub(
    data: str,
    *,
    download: bool = False,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    bad_images: BadImages = BadImages(),  # noqa: B008 (frozen)
    holdout: float = 0.2,
    holdout_seed: int = 0,
) -> ImageSource:
    """Read a dataset of the Hugging Face Hub by name: "hf:OWNER/NAME", see `HubName`.

    Args:
        data: the name; options as in "hf:uoft-cs/cifar100?label=fine_label".
        download: whether the network may be used; False reads the cache of ``datasets`` (HF_HOME) alone.
        rule: size and resize policy; a size is needed where images differ in it.
        bad_images: what to do with images that cannot be decoded.
        holdout: share of each class held out where there is no test split.
        holdout_seed: seed of that choice.

    Raises:
        MissingExtra: the package ``datasets`` is not installed.
        BadData: not cached, could not be fetched, or unsuitable; names what is missing.
        InvalidSetting: a malformed name, or an argument out of range.
    """
    asked = HubName.parse(data)
    return from_hub(
        _fetched(asked) if download else _cached(asked),
        name=asked.repository if asked.config is None else f"{asked.repository}:{asked.config}",
        train_split=asked.train,
        test_split=asked.test,
        image_column=asked.image,
        label_column=asked.label,
        image_size=rule.size,
        resize=rule.resize,
        on_bad_image=bad_images.action,
        max_skipped=bad_images.max_skipped,
        holdout=holdout,
        holdout_seed=holdout_seed,
    )


def from_hub(
    dataset: Any,
    *,
    name: str = "hub",
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: Resize = "stretch",
    holdout: float = 0.2,
    holdout_seed: int = 0,
    on_bad_image: OnBadImage = "error",
    max_skipped: float = 0.05,
    mirror_safe: bool = True,
    normalization: Normalization | None = None,
    device: str | torch.device | None = "cpu",
) -> ImageSource:
    """Read a ``datasets.Dataset`` or ``DatasetDict`` that is there already; no network.

    Images are decoded by the rule of `dsdistill.data.decode`, a batch of rows at a time; formats and transforms set on
    the dataset are not applied. The test split is read when it is first used.

    Args:
        dataset: a ``DatasetDict`` (or a dict of ``Dataset``), or one ``Dataset`` as the train split.
        name: what to call it in messages and records.
        train_split: of a dict.
        test_split: of a dict; None takes the first there is of "test", "validation", "valid" and "val". Where there
            is none, a seeded part of each class is held out.
        image_column: None takes the only column of the feature type ``Image``.
        label_column: None takes the only one of the type ``ClassLabel``. A column of plain integers may be
            named: its classes are "0", "1", ... up to the largest.
        image_size: resize to (height, width) pixels, or to a square; needed where sizes differ.
        resize: "stretch" the whole frame, "crop" its centre or "pad" it with black.
        holdout: share of each class held out where there is no test split.
        holdout_seed: seed of that choice.
        on_bad_image: "skip" leaves out images that cannot be decoded and lists them in ``source.skipped``.
        max_skipped: largest share of a split that may be left out.
        mirror_safe: False when a left-right flip may change the class.
        normalization: measured on the train split when None.
        device: where to keep the images; None picks the best device.

    Raises:
        MissingExtra: the package ``datasets`` is not installed.
        BadData: an unsuitable object, split, column, image or label; names it and lists what there is.
        InvalidSetting: an argument out of range.
        DeviceUnavailable: the device is not there.
    """
    place, rule = resolve_device(device), Rule(checked_size(image_size), resize)
    bad_images = BadImages(on_bad_image, max_skipped)
    if not 0 < holdout < 1:
        raise InvalidSetting("holdout", holdout, "the share of each class to hold out, above 0 and below 1")
    train, test = _splits(name, dataset, train_split, test_split)
    columns = _columns(name, train, image_column, label_column)
    if test is not None:
        beside = _columns(f"{name} (test)", test, columns.image, columns.label)
        require_same_classes(name, columns.classes or (), beside.classes or ())
    reader = _Reader(columns, rule, bad_images)
    images, targets, skipped = reader.read(name, train)
    classes = columns.classes or tuple(str(label) for label in range(int(targets.max()) + 1))
    warn_of_one_class(name, classes)
    whole = ImageSource(name, classes, images, targets, normalization=normalization, mirror_safe=mirror_safe)
    if test is not None:
        opener = partial(reader.open_test, name, test, classes, whole.shape[0])
    else:
        whole, held = whole.split(holdout, torch.Generator().manual_seed(holdout_seed))
        logger.info("%s: no test split; %d of %d images held out", name, len(held), len(images))
        opener = partial(_given, held)
    return ImageSource(
        name,
        classes,
        whole.images,
        whole.targets,
        normalization=normalization,
        mirror_safe=mirror_safe,
        open_test=opener,
        skipped=skipped,
    ).to(place)


# Where datasets come from ------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise MissingExtra("datasets", "hub", "reading Hugging Face datasets") from None


def _cached(asked: HubName) -> Any:
    """From the cache of ``datasets``, without any question to the network."""
    _library()
    # What datasets itself falls back to without a network; its front door asks the network first.
    builder: Any = importlib.import_module("datasets.packaged_modules.cache.cache").Cache
    try:
        return builder(
            repo_id=asked.repository,
            dataset_name=asked.repository.rpartition("/")[2],
            config_name=asked.config,
            version="auto",
            hash="auto",
        ).as_dataset()
    except (ValueError, OSError) as error:
        raise BadData(
            f"{PREFIX}{asked.repository}: not usable from the cache of Hugging Face datasets ({_line(error)}); fetch "
            "it with download=True (--load.download true), or point HF_HOME to a cache that holds it"
        ) from error


def _fetched(asked: HubName) -> Any:
    library = _library()
    try:
        return library.load_dataset(asked.repository, asked.config)
    except Exception as error:  # whatever the network and the builders of datasets raise
        raise BadData(
            f"{PREFIX}{asked.repository}: could not be fetched ({_line(error)}); check the name, the configuration "
            "and the network (HF_HUB_OFFLINE forbids it); datasets that need code of their own are not supported"
        ) from error


def _splits(name: str, dataset: Any, train: str, test: str | None) -> tuple[Any, Any]:
    library = _library()
    splits = dataset if isinstance(dataset, Mapping) else {train: dataset}
    for title, split in splits.items():
        if not isinstance(split, library.Dataset):
            raise BadData(
                f"{name}: {title!r} is a {type(split).__name__}; give a datasets.Dataset or DatasetDict "
                "(loaded without streaming=True)"
            )
    there = some(list(splits))
    if train not in splits or (test is not None and test not in splits):
        absent = test if train in splits else train
        raise BadData(f"{name}: has no split {absent!r}; there are {there}: name them (train_split=, test_split=)")
    if test == train:
        raise BadData(f"{name}: split {test!r} cannot be both the train and the test split")
    if test is None:
        test = next((title for title in _TEST_SPLITS if title in splits and title != train), None)
    for title in (train, test):
        if title is not None and len(splits[title]) == 0:
            raise BadData(f"{name}: split {title!r} has no rows")
    return splits[train], None if test is None else splits[test]


def _columns(name: str, split: Any, image: str | None, label: str | None) -> _Columns:
    library = _library()
    features = split.features
    listing = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())

    def only(asked: str | None, kind: Any, setting: str) -> str:
        found = [column for column, feature in features.items() if isinstance(feature, kind)]
        if asked is None and len(found) != 1:
            count = len(found) or "no"
            raise BadData(
                f"{name}: has {count} columns of type {kind.__name__}; name one with {setting}_column= "
                f"(?{setting}=COLUMN after hf:OWNER/NAME). Columns: {listing}"
            )
        if asked is not None and asked not in features:
            raise BadData(f"{name}: has no column {asked!r}. Columns: {listing}")
        return found[0] if asked is None else asked

    images, labels = only(image, library.Image, "image"), only(label, library.ClassLabel, "label")
    if not isinstance(features[images], library.Image):
        raise BadData(f"{name}: column {images!r} is no Image; cast it first (cast_column). Columns: {listing}")
    feature = features[labels]
    if isinstance(feature, library.ClassLabel):
        return _Columns(images, labels, tuple(str(title) for title in feature.names))
    if not isinstance(feature, library.Value) or "int" not in feature.dtype:
        raise BadData(
            f"{name}: labels in column {labels!r} are neither ClassLabel nor integers; convert them first "
            f"(class_encode_column). Columns: {listing}"
        )
    return _Columns(images, labels, None)


def _kind(feature: Any) -> str:
    names = getattr(feature, "names", None)
    if names is not None:
        return f"ClassLabel of {len(names)}"
    return str(getattr(feature, "dtype", type(feature).__name__)).rpartition(".")[2]


def _given(source: ImageSource) -> ImageSource:
    return source


# Rows --------------------------------------------------------------------------------------------------------


def _label(where: Path, label: Any) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise BadData(f"{shown(where)}: has the label {label!r}; a labelled split has 0, 1, 2, ...: choose another")
    return label


def _stacked(title: str, pixels: Mapping[Path, Pixels], channels: int | None) -> Tensor:
    """uint8 (N, C, H, W), by the rules for files of one set."""
    shapes = Shapes()
    for where, image in pixels.items():
        height, width, depth = (*image.shape, 1)[:3]
        shapes.add(where, height, width, depth)
    images = allocate(title, (len(pixels), *shapes.settle(title, channels)))
    for row, image in zip(images, pixels.values(), strict=True):
        row[:] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
