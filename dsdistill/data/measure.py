"""What identifies and describes a set of images, computed in one pass over its pixels."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dsdistill.data.normalize import Normalization


def fingerprint(
    classes: Sequence[str], shape: tuple[int, int, int, int], chunks: Iterable[Tensor], targets: Tensor
) -> str:
    """sha256 of class names, shape, pixels (parts of uint8 (N, C, H, W) in order) and targets (N,)."""
    header = {"classes": tuple(classes), "shape": shape}
    # JSON escapes everything outside ASCII, so names that are not valid UTF-8 hash too.
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode("ascii") + b"\n")
    for chunk in chunks:
        digest.update(chunk.cpu().contiguous().numpy().data.cast("B"))
    digest.update(targets.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class Histograms:
    """Counts of the 256 values of each channel, gathered part by part; exact, so parts and devices do not matter."""

    def __init__(self, channels: int) -> None:
        self._counts = torch.zeros(channels, 256, dtype=torch.int64)

    def watching(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same uint8 parts (n, C, H, W), counted on their way."""
        for chunk in chunks:
            for channel, counts in enumerate(self._counts):
                counts += torch.bincount(chunk[:, channel].reshape(-1), minlength=256).cpu()
            yield chunk

    def normalization(self) -> Normalization:
        """Mean and population deviation as `Normalization.measure` gives them for the same images."""
        return Normalization.of_histograms(self._counts.tolist())
