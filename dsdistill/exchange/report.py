"""What an export wrote and lost."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset


class Export(NamedTuple):
    """What an export wrote and lost.

    ``clipped``: share of pixel values outside [0, 1] that were cut off; ``rounding``: largest change of a
    value inside the range by 8-bit rounding, in units of [0, 1]; both 0 for lossless formats.
    """

    path: Path
    images: int
    clipped: float = 0.0
    rounding: float = 0.0


def eight_bits(synthetic: "SyntheticDataset", path: Path) -> tuple[Tensor, Export]:
    """The decoded images as uint8 (M, C, H, W), and what that loses."""
    images, _ = synthetic.tensors()
    unit, pixels = synthetic.normalization.to_unit(images), synthetic.normalization.to_uint8(images)
    inside = unit.clamp(0, 1)
    return pixels, Export(
        path,
        len(images),
        clipped=float(((unit - inside).abs() > 1e-6).float().mean()),  # 0 may come back as -1e-8
        rounding=float((pixels.float() / 255 - inside).abs().max()),
    )
