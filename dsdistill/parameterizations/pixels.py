"""The plain form: one stored image is one training image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsdistill.errors import BadData, ShapeMismatch
from dsdistill.parameterizations.base import Decoded, Form, Parameterization


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

    @property
    def multiplicity(self) -> Tensor:
        return torch.ones(self.count, dtype=torch.int64)

    def decode(self, index: Tensor | None = None) -> Decoded:
        if index is None:
            return Decoded(self.pixels, torch.arange(self.count))
        rows = index.to(self.pixels.device, non_blocking=True)
        return Decoded(self.pixels.index_select(0, rows), index)

    @torch.no_grad()
    def imitate(self, images: Tensor) -> None:
        if images.shape != self.pixels.shape:
            raise ShapeMismatch("the images to imitate", tuple(images.shape), str(tuple(self.pixels.shape)))
        self.pixels.copy_(images)

    def tensors(self) -> dict[str, Tensor]:
        return {"pixels": self.pixels.detach()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(checked_pixels(tensors, {"pixels"}))

    def subset(self, index: Tensor) -> Self:
        return type(self)(self.decode(index).images)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.pixels for part in parts]))


@dataclass(frozen=True, kw_only=True)
class Plain(Form):
    """Plain pixels: one stored image is one training image."""

    def images_per_class(self, ipc: int) -> int:
        return ipc

    def build(self, per_class: Sequence[int], shape: tuple[int, int, int]) -> Pixels:
        return Pixels(torch.zeros(sum(per_class), *shape))


def checked_pixels(tensors: Mapping[str, Tensor], names: set[str]) -> Tensor:
    """The tensor "pixels" of a saved set as float32, after checking that exactly the named tensors are there.

    Raises:
        BadData: other tensors, integers, or values that do not fit float32.
    """
    if set(tensors) != names or not tensors["pixels"].is_floating_point():
        listing = ", ".join(sorted(names))
        raise BadData(f"this form needs the tensors {listing} with floating-point pixels, got {sorted(tensors)}")
    pixels = tensors["pixels"].float()
    if not bool(torch.isfinite(pixels).all()):
        raise BadData("pixels do not fit float32: NaN or infinity")
    return pixels
