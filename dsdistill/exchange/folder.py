"""An image folder of 8-bit PNG files, as every program reads it."""

import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dsdistill.core import storage
from dsdistill.exchange.report import Export, eight_bits, warn_of_learned
from dsdistill.labels import HardLabels

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
_LONGEST = 200  # bytes of a folder name; file systems allow 255


def write_image_folder(synthetic: "SyntheticDataset", path: Path) -> Export:
    """``path/CLASS/000000.png``: clipped to [0, 1], rounded to 8 bits, numbered in the order of the set."""
    pixels, report = eight_bits(synthetic, path)
    warn_of_learned(synthetic, path)
    if not isinstance(synthetic.labels, HardLabels):
        logger.warning(
            "%s: a folder of pictures has no place for learned labels: each image lies under the class it was made "
            "for; npz, pt and parquet keep them",
            path,
        )
    names = class_folders(synthetic.classes)
    with storage.new_folder(path) as folder:
        for name in names:
            (folder / name).mkdir()
        for index, (image, made_for) in enumerate(zip(pixels, synthetic.targets, strict=True)):
            storage.write_bytes(folder / names[made_for] / f"{index:06d}.png", encode_png(image))
    return report


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
