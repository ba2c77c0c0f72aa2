"""Multi-formation (Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, arXiv 2205.14959).

A stored image of H x W pixels is cut into f x f tiles, each enlarged (bilinear) to H x W: f² training images for the
bytes of one. Where f does not divide a side, the image is padded at the bottom and right up to the next multiple.

Departures from the authors' code: the padding is 0 in standardised units, the mean colour, where they pad grey 0.5; and
initial tiles are made by an antialiased resize at the decoder's own tile size, where they take the nearest pixel at
sizes that the decoder does not always share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Self

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch
from dsdistill.parameterizations.base import Decoded, Form, Parameterization
from dsdistill.parameterizations.pixels import checked_pixels


class Tiles(Parameterization):
    """Stored images (N, C, H, W), float32, standardised; image n holds ``factors[n]``² tiles.

    `decode` goes through the factors from large to small, and within a factor tile by tile, row-major: first the top
    left tile of all images, then the next one of all images, and so on.

    Args:
        images: (N, C, H, W).
        factors: (N,) integers, tiles along each side, from 1 to 255 and no more than pixels.

    Raises:
        ShapeMismatch: images or factors have another shape.
        BadData: a factor is out of range.
    """

    key = "tiles"

    def __init__(self, images: Tensor, factors: Tensor) -> None:
        super().__init__()
        if images.dim() != 4:
            raise ShapeMismatch("the stored images", tuple(images.shape), "(N, C, H, W)")
        if factors.shape != images.shape[:1] or factors.is_floating_point():
            raise ShapeMismatch("factors", tuple(factors.shape), f"({len(images)},) integers, one per stored image")
        limit = min(255, *images.shape[2:])
        if len(factors) and not 1 <= int(factors.min()) <= int(factors.max()) <= limit:
            raise BadData(f"tile factors span [{int(factors.min())}, {int(factors.max())}]; use 1 to {limit}")
        self.pixels = nn.Parameter(images.detach().clone(memory_format=torch.contiguous_format))
        self.factors = factors.detach().to("cpu", torch.int64, copy=True)

    @property
    def count(self) -> int:
        return len(self.pixels)

    @property
    def multiplicity(self) -> Tensor:
        return self.factors.square()

    def decode(self, index: Tensor | None = None) -> Decoded:
        chosen = torch.arange(self.count) if index is None else index
        images, owners = [], []
        for factor, items in self._by_factor(chosen):
            rows = items.to(self.pixels.device, non_blocking=True)
            images.append(cut_tiles(self.pixels.index_select(0, rows), factor))
            owners.append(items.repeat(factor**2))
        if not images:
            return Decoded(self.pixels[:0], chosen)
        return Decoded(torch.cat(images), torch.cat(owners))

    @torch.no_grad()
    def imitate(self, images: Tensor) -> None:
        expected = (int(self.multiplicity.sum()), *self.pixels.shape[1:])
        if tuple(images.shape) != expected:
            raise ShapeMismatch("the images to imitate", tuple(images.shape), str(expected))
        images, start = images.to(self.pixels.device), 0
        for factor, items in self._by_factor(torch.arange(self.count)):
            end = start + len(items) * factor**2
            self.pixels[items.to(self.pixels.device)] = paste_tiles(images[start:end], factor)
            start = end

    def _by_factor(self, index: Tensor) -> list[tuple[int, Tensor]]:
        """The items at ``index`` by their factor, the largest factor first."""
        factors = self.factors[index]
        return [(factor, index[factors == factor]) for factor in sorted(set(factors.tolist()), reverse=True)]

    def tensors(self) -> dict[str, Tensor]:
        return {"pixels": self.pixels.detach(), "factors": self.factors.to(torch.uint8)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(checked_pixels(tensors, {"pixels", "factors"}), tensors["factors"])

    def subset(self, index: Tensor) -> Self:
        rows = index.to(self.pixels.device)
        return type(self)(self.pixels.index_select(0, rows), self.factors[index.cpu()])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.pixels for part in parts]), torch.cat([part.factors for part in parts]))


@dataclass(frozen=True, kw_only=True)
class Tiled(Form):
    """Multi-formation: a stored image holds factor x factor small ones, enlarged on use (IDC)."""

    factor: Annotated[int, Ge(1), Le(255)] = 2
    """Tiles along each side of a stored image."""
    bound: Annotated[int, Ge(1)] | None = None
    """Most training images per class, or null: as many stored images as fit get the full factor, the next ones less."""

    def factors(self, ipc: int) -> list[int]:
        """Tiles along each side of the ``ipc`` stored images of a class.

        Raises:
            InvalidSetting: the bound is below ``ipc``.
        """
        if self.bound is None:
            return [self.factor] * ipc
        if self.bound < ipc:
            raise InvalidSetting("Tiled.bound", self.bound, f"at least the {ipc} stored images of a class")
        made: list[int] = []
        used = 0
        for factor in range(self.factor, 0, -1):
            # The authors' rule. It sets one tile aside for every image still without a factor and then charges the
            # whole factor², so the total may stay a few images below the bound.
            remaining = ipc - len(made)
            count = remaining if factor == 1 else min((self.bound - used - remaining) // factor**2, remaining)
            made += [factor] * count
            used += count * factor**2
        return made

    def images_per_class(self, ipc: int) -> int:
        return sum(factor**2 for factor in self.factors(ipc))

    def build(self, per_class: Sequence[int], shape: tuple[int, int, int]) -> Tiles:
        if self.factor > min(shape[1:]):
            raise InvalidSetting("Tiled.factor", self.factor, f"no more than the {min(shape[1:])} pixels of a side")
        factors = [factor for ipc in per_class for factor in self.factors(ipc)]
        return Tiles(torch.zeros(len(factors), *shape), torch.tensor(factors, dtype=torch.int64))


def cut_tiles(images: Tensor, factor: int) -> Tensor:
    """Tiles of stored images, each enlarged to a whole image: (N, C, H, W) -> (factor² N, C, H, W), tile-major."""
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    down, right = -(-height // factor), -(-width // factor)
    padded = F.pad(images, (0, right * factor - width, 0, down * factor - height))
    tiles = padded.view(count, channels, factor, down, factor, right).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
    # Two matrix products rather than the library's interpolation: its gradient is summed in no fixed order on CUDA.
    rows = _enlarging(down, height, images.device, images.dtype)
    columns = _enlarging(right, width, images.device, images.dtype)
    return rows @ tiles @ columns.T


def paste_tiles(images: Tensor, factor: int) -> Tensor:
    """Stored images whose tiles are ``images`` made small, antialiased: (factor² N, C, H, W) -> (N, C, H, W)."""
    if factor == 1:
        return images
    channels, height, width = images.shape[1:]
    down, right = -(-height // factor), -(-width // factor)
    small = F.interpolate(images, (down, right), mode="bilinear", antialias=True, align_corners=False)
    tiles = small.view(factor, factor, -1, channels, down, right).permute(2, 3, 0, 4, 1, 5)
    return tiles.reshape(-1, channels, factor * down, factor * right)[..., :height, :width]


@lru_cache(maxsize=64)
def _enlarging(small: int, large: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(large, small): bilinear interpolation of a line of pixels as a matrix."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(small, device=device, dtype=dtype)[None]
        return F.interpolate(unit, large, mode="linear", align_corners=False)[0].T.contiguous()
