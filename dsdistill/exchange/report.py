"""What an export wrote and lost."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")


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


def shown_learned(learned: Mapping[str, Tensor]) -> list[str]:
    """Learned tensors in words: a single number by its value ("lr = 0.01854"), others by their shape."""
    return [
        f"{name} = {tensor.item():.4g}" if tensor.numel() == 1 else f"{name} of shape {tuple(tensor.shape)}"
        for name, tensor in learned.items()
    ]


def warn_of_learned(synthetic: "SyntheticDataset", path: Path, kept: Collection[str] = ()) -> None:
    """Say which learned tensors, but for those called ``kept``, a format has no place for."""
    lost = shown_learned({name: tensor for name, tensor in synthetic.learned.items() if name not in kept})
    if lost:
        logger.warning("%s: this format has no place for the learned %s; the set keeps it", path, ", ".join(lost))
