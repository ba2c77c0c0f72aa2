"""Formats of other programs: image folders, npz, parquet, the field's ``.pt`` tensors, the Hugging Face Hub."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsdistill.core import storage
from dsdistill.errors import InvalidSetting, OutputConflict
from dsdistill.exchange.arrays import write_npz, write_pt
from dsdistill.exchange.folder import class_folders, encode_png, write_image_folder
from dsdistill.exchange.parquet import write_parquet
from dsdistill.exchange.published import Published, read_published
from dsdistill.exchange.report import Export

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset

_WRITERS: Mapping[str, Callable[["SyntheticDataset", Path], Export]] = {
    "folder": write_image_folder,
    "npz": write_npz,
    "pt": write_pt,
    "parquet": write_parquet,
}
FORMATS = tuple(_WRITERS)
_IMAGES = ("folder", "parquet")  # as image files, which have 1 or 3 channels


def export(synthetic: "SyntheticDataset", path: Path, format: str) -> Export:
    """Write ``synthetic`` at ``path``; see `SyntheticDataset.export`."""
    if format not in FORMATS:
        raise InvalidSetting("format", format, f"one of {', '.join(FORMATS)}")
    if format in _IMAGES and synthetic.shape[0] not in (1, 3):
        raise InvalidSetting("format", format, f"PNG files have 1 or 3 channels, not {synthetic.shape[0]}; use npz")
    if os.path.lexists(path):  # a link that leads nowhere is somebody's too
        raise OutputConflict(path, "exists already; choose another path")
    storage.ensure_writable(path.parent)
    with storage.space_for(path, synthetic.nbytes.total):
        return _WRITERS[format](synthetic, path)


__all__ = ["FORMATS", "Export", "Published", "class_folders", "encode_png", "export", "read_published"]
