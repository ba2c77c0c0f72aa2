"""Formats of other programs: an image folder of PNG files, or one npz of arrays."""

import io
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from dsdistill.core import storage
from dsdistill.errors import InvalidSetting, OutputConflict

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset

FORMATS = ("folder", "npz")
_LONGEST = 200  # bytes of a folder name; file systems allow 255


class Export(NamedTuple):
    """What an export wrote and lost.

    ``clipped``: share of pixel values outside [0, 1] that were cut off; ``rounding``: largest change of a
    value inside the range by 8-bit rounding, in units of [0, 1]; both 0 for lossless formats.
    """

    path: Path
    images: int
    clipped: float
    rounding: float


def export(synthetic: "SyntheticDataset", path: Path, format: str) -> Export:
    """Write ``synthetic`` at ``path``; see `SyntheticDataset.export`."""
    if format not in FORMATS:
        raise InvalidSetting("format", format, f"one of {', '.join(FORMATS)}")
    if format == "folder" and synthetic.shape[0] not in (1, 3):
        raise InvalidSetting("format", format, f"PNG files have 1 or 3 channels, not {synthetic.shape[0]}; use npz")
    if path.exists():
        raise OutputConflict(path, "exists already; choose another path")
    storage.ensure_writable(path.parent)
    return _export_folder(synthetic, path) if format == "folder" else _export_npz(synthetic, path)


def encode_png(image: Tensor) -> bytes:
    """(3, H, W) or (1, H, W) uint8 -> PNG bytes."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()


def class_folders(names: Sequence[str]) -> list[str]:
    """Class names as folder names, distinct also where case is ignored, in an order that keeps the labels.

    Characters that a file system refuses are percent-quoted. Programs that read image folders number the classes by
    sorted name; where that would change the labels, or two names would meet, each name gets its label in front.
    """
    folders = [_folder(name) for name in names]
    if folders != sorted(folders) or len({folder.lower() for folder in folders}) < len(folders):
        digits = len(str(len(names) - 1))
        folders = [f"{label:0{digits}d} {folder}" for label, folder in enumerate(folders)]
    return folders


def _folder(name: str) -> str:
    quoted = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|%\ud800-\udfff]', lambda match: _quoted(match[0]), name).strip(" .")
    while len(quoted.encode()) > _LONGEST:
        quoted = quoted[:-1]
    return quoted if quoted else _quoted(name) or "%"


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))[:_LONGEST]


def _export_folder(synthetic: "SyntheticDataset", path: Path) -> Export:
    images, _ = synthetic.tensors()
    unit = synthetic.normalization.to_unit(images)
    pixels = synthetic.normalization.to_uint8(images)
    inside = unit.clamp(0, 1)
    names = class_folders(synthetic.classes)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    try:
        for name in names:
            (temporary / name).mkdir()
        for index, (image, target) in enumerate(zip(pixels, synthetic.targets, strict=True)):
            storage.write_bytes(temporary / names[target] / f"{index:06d}.png", encode_png(image))
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    storage.fsync_folder(path.parent)
    return Export(
        path,
        len(images),
        clipped=float(((unit - inside).abs() > 1e-6).float().mean()),  # 0 may come back as -1e-8,
        rounding=float((pixels.float() / 255 - inside).abs().max()),
    )


def _export_npz(synthetic: "SyntheticDataset", path: Path) -> Export:
    import numpy as np

    images, targets = synthetic.tensors()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=images.numpy(),
        targets=targets.numpy(),
        mean=np.array(synthetic.normalization.mean, dtype=np.float64),
        std=np.array(synthetic.normalization.std, dtype=np.float64),
        classes=np.array(synthetic.classes),
    )
    storage.write_bytes(path, buffer.getvalue())
    return Export(path, len(images), 0.0, 0.0)
