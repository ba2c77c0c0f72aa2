"""The plain form: one stored image is one training image."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsdistill.errors import BadData, ShapeMismatch
from dsdistill.parameterizations.base import Decoded, Parameterization


class Pixels(Parameterization):
    """Standardised pixels as one parameter (N, C, H, W), float32, neither clamped nor quantised."""

    key = "pixels"

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        if images.dim() != 4:
            raise ShapeMismatch("the images", tuple(images.shape), "(N, C, H, W)")
        self.pixels = nn.Parameter(images.detach().clone(memory_format=torch.contiguous_format))

    @property
    def count(self) -> int:
        return len(self.pixels)

    def decode(self, index: Tensor | None = None) -> Decoded:
        if index is None:
            return Decoded(self.pixels, torch.arange(self.count))
        rows = index.to(self.pixels.device, non_blocking=True)
        return Decoded(self.pixels.index_select(0, rows), index)

    def tensors(self) -> dict[str, Tensor]:
        return {"pixels": self.pixels.detach()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        if set(tensors) != {"pixels"} or not tensors["pixels"].is_floating_point():
            raise BadData(f"pixels need one floating-point tensor 'pixels', got {sorted(tensors)}")
        pixels = tensors["pixels"].float()
        if not bool(torch.isfinite(pixels).all()):
            raise BadData("pixels do not fit float32: NaN or infinity")
        return cls(pixels)

    def subset(self, index: Tensor) -> Self:
        return type(self)(self.decode(index).images)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.pixels for part in parts]))
