"""Image files by class, as found in class folders."""

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import overload

import torch

from dsdistill.data.checks import some
from dsdistill.data.decode import EXTENSIONS, shown
from dsdistill.errors import BadData


@dataclass(frozen=True)
class Listing:
    """Image files of one split, class after class. Only names are kept: about a hundred bytes per file.

    Attributes:
        classes: names of the classes.
        folders: where the files of each class are.
        counts: how many each class has.
        names: of all files, relative to the folder of their class.
    """

    classes: tuple[str, ...]
    folders: tuple[Path, ...]
    counts: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.counts))

    @property
    def paths(self) -> "Paths":
        """The files; each path is made when it is asked for."""
        return Paths(self)

    def owner(self, index: int) -> int:
        """Class index of a file."""
        return bisect.bisect_right(self._ends, index)

    def chosen(self, indices: torch.Tensor) -> "Listing":
        """The files at ascending indices (M,)."""
        counts = torch.bincount(self.targets()[indices], minlength=len(self.classes)).tolist()
        return Listing(
            self.classes, self.folders, tuple(counts), tuple(self.names[index] for index in indices.tolist())
        )

    def targets(self) -> torch.Tensor:
        """Class index of each file, int64 (N,)."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    def targets_at(self, where: str, indices: torch.Tensor | None) -> torch.Tensor:
        """Class index of the files at indices (M,) that could be decoded; None means of all.

        Raises:
            BadData: no file of a class is left.
        """
        targets = self.targets() if indices is None else self.targets()[indices]
        left = torch.bincount(targets, minlength=len(self.classes)).tolist()
        empty = [title for title, count in zip(self.classes, left, strict=True) if not count]
        if empty:
            raise BadData(f"{where}: no image of {some(empty)} can be decoded; replace the files or remove the class")
        return targets


class Paths(Sequence[Path]):
    """The paths of a listing as a sequence that holds none of them."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._listing.folders[self._listing.owner(index)] / self._listing.names[index]


def list_images(root: Path) -> Listing:
    """Files of every class folder in ``root``, classes and files sorted by name.

    Raises:
        BadData: no class folders, one without images, or one that cannot be read.
    """
    folders = class_folders(root)
    if not folders:
        raise BadData(f"{shown(root)}: no class folders; put the images of each class into a folder of its own there")
    # By path component, so that a/b.png comes before a-1.png.
    found = [sorted(_images(folder), key=lambda name: name.split(os.sep)) for folder in folders]
    empty = [shown(folder) for folder, names in zip(folders, found, strict=True) if not names]
    if empty:
        raise BadData(
            f"no images in {some(empty)}; add images ({' '.join(sorted(EXTENSIONS))}) or remove the class folder"
        )
    return Listing(
        tuple(folder.name for folder in folders),
        tuple(folders),
        tuple(len(names) for names in found),
        tuple(name for names in found for name in names),
    )


def class_folders(root: Path) -> list[Path]:
    """Visible folders in ``root``, sorted by name.

    Raises:
        BadData: ``root`` is no folder or cannot be read.
    """
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        raise BadData(f"{shown(root)}: no such folder; check the path") from None
    except NotADirectoryError:
        raise BadData(f"{shown(root)}: is a file; give the folder that holds the class folders") from None
    except OSError as error:
        raise BadData(f"{shown(root)}: cannot be read ({error.strerror}); check its permissions") from None


def _images(folder: Path) -> Iterator[str]:
    """Visible image files at any depth below a class folder; links to folders are not followed, they may loop."""

    def refuse(error: OSError) -> None:
        where = shown(Path(error.filename or folder))
        raise BadData(f"{where}: cannot be read ({error.strerror}); check its permissions") from None

    for parent, children, names in os.walk(folder, onerror=refuse):
        children[:] = [child for child in children if not child.startswith(".")]
        inside = os.path.relpath(parent, folder)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield name if inside == os.curdir else os.path.join(inside, name)
