"""Folders of images: one sub-folder per class, with or without ``train/`` and ``test/`` above them."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from dsdistill.data.cache import ensure_cached
from dsdistill.data.checks import counted, require_same_classes, some, stratified, warn_of_one_class
from dsdistill.data.decode import Rule, probe, read_bytes, shown
from dsdistill.data.listing import Listing, class_folders, list_images
from dsdistill.data.normalize import Normalization
from dsdistill.data.read import BadImages, check_files, other_size, read_files
from dsdistill.data.source import ImageSource, Skipped
from dsdistill.errors import BadData, InvalidSetting

Storage = Literal["auto", "memory", "cache"]

MEMORY_LIMIT = 2**30
"""Bytes of decoded images, counted as colour, up to which storage="auto" keeps them in memory."""

logger = logging.getLogger("dsdistill")


@dataclass(frozen=True)
class Reading:
    """How files become a source.

    Attributes:
        rule: size and resize policy.
        storage: "memory" decodes the train split into memory now and the test split when it is used; "cache" decodes
            both into files of `dsdistill.data.cache` and reads from there; "auto" takes the cache for more than
            `MEMORY_LIMIT` bytes.
        bad_images: what to do with files that cannot be decoded. Those left out are listed in ``source.skipped``,
            those of the test split in ``source.test.skipped``.
    """

    rule: Rule = Rule()
    storage: Storage = "auto"
    bad_images: BadImages = BadImages()

    def __post_init__(self) -> None:
        if self.storage not in get_args(Storage):
            raise InvalidSetting("storage", self.storage, f"choose one of {', '.join(get_args(Storage))}")


def load_folder(
    path: str | Path,
    reading: Reading = Reading(),
    *,
    holdout: float = 0.2,
    holdout_seed: int = 0,
    mirror_safe: bool = True,
) -> ImageSource:
    """Read a folder of images as uint8, into memory or into a cache on the disk.

    Two layouts: ``train/CLASS/*`` with ``test/CLASS/*`` or ``val/CLASS/*`` (``test/`` when both are there), or
    ``CLASS/*`` alone, or under ``train/`` alone; then a seeded part of each class is held out as the test split.
    Classes are the names of the class folders, sorted; images are found at any depth below them; names that
    start with a dot are ignored. How files become pixels: see `dsdistill.data.decode`. Files of the test split are
    checked now, but opened only when it is first used. Statistics are measured on the train split. Where the images
    are kept changes neither them nor what is drawn.

    Args:
        path: the folder.
        reading: size and resize policy, where the images are kept, what becomes of files that cannot be decoded.
        holdout: share of each class held out when the folder has no test split, above 0 and below 1.
        holdout_seed: seed of that choice.
        mirror_safe: False when a left-right flip may change the class.

    Raises:
        BadData: the folder or an image is missing, empty, unreadable or corrupt, sizes are mixed, or the classes
            of the test split differ; names the file or folder.
        InvalidSetting: an argument out of range.
        OutOfSpace: the disk cannot hold the cache.
    """
    root = Path(path).expanduser()
    train, test = _splits(root, holdout, holdout_seed)
    name = shown(Path(root.resolve().name))
    return load_listings(name, shown(root), train, test, reading, mirror_safe=mirror_safe)


def load_listings(
    name: str,
    where: str,
    train: Listing,
    test: Listing,
    reading: Reading = Reading(),
    *,
    mirror_safe: bool = True,
    normalization: Normalization | None = None,
) -> ImageSource:
    """Read image files that are listed already.

    Args:
        name: of the source.
        where: what to call the place of the files in messages.
        train: files of the train split.
        test: files of the test split, of the same classes.
        reading: how.
        mirror_safe: False when a left-right flip may change the class.
        normalization: measured on the train split when None.

    Raises:
        BadData: see `load_folder`.
    """
    load = _through_cache if _is_cached(train, test, reading) else _into_memory
    source = load(name, where, train, test, reading, mirror_safe)
    warn_of_one_class(name, source.classes)
    channels, height, width = source.shape
    classes, planes = counted(source.num_classes, "class", "classes"), counted(channels, "channel")
    logger.info("%s: %s, %d x %d pixels, %s", name, classes, height, width, planes)
    return source if normalization is None else source.normalized_by(normalization)


def _is_cached(train: Listing, test: Listing, reading: Reading) -> bool:
    if reading.storage != "auto":
        return reading.storage == "cache"
    for path in train.paths:
        try:
            height, width, channels = probe(path, read_bytes(path))
        except BadData:  # whoever reads it in earnest will say so
            continue
        height, width = reading.rule.size or (height, width)
        return (len(train) + len(test)) * height * width * max(3, channels) > MEMORY_LIMIT
    return False


def _through_cache(
    name: str, where: str, train: Listing, test: Listing, reading: Reading, mirror_safe: bool
) -> ImageSource:
    kept = ensure_cached(where, train, reading.rule, bad_images=reading.bad_images)
    channels, height, width = kept.image_shape
    title = f"{where} (test split)"
    held = ensure_cached(title, test, reading.rule, channels=channels, bad_images=reading.bad_images)
    if held.image_shape[1:] != (height, width):
        raise BadData(f"{title}: {other_size(*held.image_shape[1:], (height, width))}")
    return kept.open(name, mirror_safe=mirror_safe, open_test=partial(held.open, f"{name} (test)"))


def _into_memory(
    name: str, where: str, train: Listing, test: Listing, reading: Reading, mirror_safe: bool
) -> ImageSource:
    images, places, skipped = read_files(where, train.paths, reading.rule, bad_images=reading.bad_images)
    targets = train.targets_at(where, torch.tensor(places))
    channels, height, width = images.shape[1:]
    title = f"{where} (test split)"
    bad = check_files(title, test.paths, reading.rule, (height, width), reading.bad_images)
    # Checked, but not kept: the test split comes into memory when it is opened, in the form of the train split.
    if bad:
        left_out = {entry.path for entry in bad}
        good = torch.tensor([index for index, path in enumerate(test.paths) if path not in left_out])
        test.targets_at(title, good)
        test = test.chosen(good)
    opener = partial(_open, f"{name} (test)", title, test, reading.rule, channels, bad)
    return ImageSource(name, train.classes, images, targets, mirror_safe=mirror_safe, open_test=opener, skipped=skipped)


def _open(
    name: str, where: str, listing: Listing, rule: Rule, channels: int, skipped: tuple[Skipped, ...]
) -> ImageSource:
    images, _, _ = read_files(where, listing.paths, rule, channels)
    return ImageSource(name, listing.classes, images, listing.targets(), skipped=skipped)


def _splits(root: Path, holdout: float, holdout_seed: int) -> tuple[Listing, Listing]:
    if not 0 < holdout < 1:
        raise InvalidSetting("holdout", holdout, "the share of each class to hold out, above 0 and below 1")
    folders = {entry.name: entry for entry in class_folders(root)}
    tests = [name for name in ("test", "val") if name in folders]
    # A folder named "train" may also be a class (of vehicles): it is a split when splits or classes go with it.
    if "train" in folders and (tests or class_folders(folders["train"])):
        train = list_images(folders["train"])
        if tests:
            others = sorted(set(folders) - {"train", tests[0]})
            unused = f"; not used: {some([f'{other}/' for other in others])}" if others else ""
            logger.info("%s: test split is %s/%s", shown(root), tests[0], unused)
            test = list_images(folders[tests[0]])
            require_same_classes(shown(root), train.classes, test.classes)
            return train, test
        root = folders["train"]
    everything = list_images(root)
    generator = torch.Generator().manual_seed(holdout_seed)
    kept, held = stratified(shown(root), everything.classes, everything.counts, holdout, generator)
    logger.info("%s: no test split; %d of %d images held out", shown(root), len(held), len(everything))
    return everything.chosen(kept), everything.chosen(held)
