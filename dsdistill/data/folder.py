"""Folders of images: one sub-folder per class, with or without ``train/`` and ``test/`` above them."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsdistill.data.checks import require_same_classes, some, stratified
from dsdistill.data.decode import EXTENSIONS, check_files, checked_size, read_files, shown
from dsdistill.data.source import ImageSource
from dsdistill.errors import BadData, InvalidSetting

logger = logging.getLogger("dsdistill")


@dataclass(frozen=True)
class _Listing:
    """Image files of one split, class after class."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    files: tuple[Path, ...]

    def chosen(self, indices: torch.Tensor) -> "_Listing":
        """The files at ascending indices."""
        targets = self.targets()[indices]
        counts = torch.bincount(targets, minlength=len(self.classes)).tolist()
        return _Listing(self.classes, tuple(counts), tuple(self.files[index] for index in indices.tolist()))

    def targets(self) -> torch.Tensor:
        """int64 (N,)."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))


def load_folder(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    holdout: float = 0.2,
    holdout_seed: int = 0,
    mirror_safe: bool = True,
) -> ImageSource:
    """Read a folder of images as uint8 on the CPU.

    Two layouts: ``train/CLASS/*`` with ``test/CLASS/*`` or ``val/CLASS/*`` (``test/`` when both are there), or
    ``CLASS/*`` alone, or under ``train/`` alone; then a seeded part of each class is held out as the test split.
    Classes are the names of the class folders, sorted; images are found at any depth below them; names that
    start with a dot are ignored. How files become pixels: see `dsdistill.data.decode`. Files of the test
    split are checked, but decoded into memory only when it is first used. Statistics are measured on the train split.

    Args:
        path: the folder.
        image_size: (height, width) in pixels, or one int for both: every whole frame is stretched to it.
        holdout: share of each class held out when the folder has no test split, above 0 and below 1.
        holdout_seed: seed of that choice.
        mirror_safe: False when a left-right flip may change the class.

    Raises:
        BadData: the folder or an image is missing, empty, unreadable or corrupt, sizes are mixed, or the classes
            of the test split differ; names the file or folder.
        InvalidSetting: image_size, holdout or holdout_seed out of range.
    """
    root = Path(path).expanduser()
    size = checked_size(image_size)
    train, test = _splits(root, holdout, holdout_seed)
    name = shown(Path(root.resolve().name))
    images = read_files(shown(root), train.files, size)
    channels, height, width = images.shape[1:]
    check_files(test.files, size, (height, width))
    # Checked, but not kept: the test split comes into memory when it is opened, in the form of the train split.
    opener = partial(_open, name, shown(root), test, size, channels)
    logger.info("%s: %d classes, %d x %d pixels, %d channels", name, len(train.classes), height, width, channels)
    return ImageSource(name, train.classes, images, train.targets(), mirror_safe=mirror_safe, open_test=opener)


def _open(name: str, where: str, listing: _Listing, size: tuple[int, int] | None, channels: int) -> ImageSource:
    images = read_files(f"{where} (test split)", listing.files, size, channels)
    return ImageSource(f"{name} (test)", listing.classes, images, listing.targets())


def _splits(root: Path, holdout: float, holdout_seed: int) -> tuple[_Listing, _Listing]:
    if not 0 < holdout < 1:
        raise InvalidSetting("holdout", holdout, "the share of each class to hold out, above 0 and below 1")
    folders = {entry.name: entry for entry in _folders(root)}
    tests = [name for name in ("test", "val") if name in folders]
    # A folder named "train" may also be a class (of vehicles): it is a split when splits or classes go with it.
    if "train" in folders and (tests or _folders(folders["train"])):
        train = _listing(folders["train"])
        if tests:
            others = sorted(set(folders) - {"train", tests[0]})
            unused = f"; not used: {some([f'{other}/' for other in others])}" if others else ""
            logger.info("%s: test split is %s/%s", shown(root), tests[0], unused)
            test = _listing(folders[tests[0]])
            require_same_classes(shown(root), train.classes, test.classes)
            return train, test
        root = folders["train"]
    everything = _listing(root)
    generator = torch.Generator().manual_seed(holdout_seed)
    kept, held = stratified(shown(root), everything.classes, everything.counts, holdout, generator)
    logger.info("%s: no test split; %d of %d images held out", shown(root), len(held), len(everything.files))
    return everything.chosen(kept), everything.chosen(held)


def _listing(root: Path) -> _Listing:
    folders = _folders(root)
    if not folders:
        raise BadData(f"{shown(root)}: no class folders; put the images of each class into a folder of its own there")
    files = [sorted(_images(folder)) for folder in folders]
    empty = [shown(folder) for folder, found in zip(folders, files, strict=True) if not found]
    if empty:
        raise BadData(
            f"no images in {some(empty)}; add images ({' '.join(sorted(EXTENSIONS))}) or remove the class folder"
        )
    return _Listing(
        tuple(folder.name for folder in folders),
        tuple(len(found) for found in files),
        tuple(file for found in files for file in found),
    )


def _folders(root: Path) -> list[Path]:
    """Visible folders in ``root``, sorted by name."""
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        raise BadData(f"{shown(root)}: no such folder; check the path") from None
    except NotADirectoryError:
        raise BadData(f"{shown(root)}: is a file; give the folder that holds the class folders") from None
    except OSError as error:
        raise BadData(f"{shown(root)}: cannot be read ({error.strerror}); check its permissions") from None


def _images(folder: Path) -> Iterator[Path]:
    """Visible image files at any depth below a class folder; links to folders are not followed, they may loop."""

    def refuse(error: OSError) -> None:
        where = shown(Path(error.filename or folder))
        raise BadData(f"{where}: cannot be read ({error.strerror}); check its permissions") from None

    for parent, children, names in os.walk(folder, onerror=refuse):
        children[:] = [child for child in children if not child.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(parent, name)
