"""Standardisation of pixels: per channel, subtract the mean and divide by the standard deviation; then ZCA, if any.

One `Normalization` travels with the real images, their test split and every synthetic set made from them, so
nobody has to type the constants twice.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsdistill.data.whitening import Whitening
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

KIND, ZCA_KIND = "standardize", "zca"


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, in units of the full pixel range [0, 1], and optional whitening.

    Attributes:
        mean: subtracted from each channel.
        std: divides each channel.
        zca: applied to whole images after that; None for none. `whitened` fits it.

    Raises:
        InvalidSetting: lengths differ or are zero, a value is not finite, or a deviation is not positive.
        ShapeMismatch: the whitening is of another number of channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    zca: Whitening | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _numbers("Normalization.mean", self.mean))
        object.__setattr__(self, "std", _numbers("Normalization.std", self.std))
        if len(self.mean) != len(self.std):
            raise InvalidSetting("Normalization.std", self.std, f"needs {len(self.mean)} values, as many as the mean")
        # Judged as float32, the precision of the arithmetic: 1e-60 would divide by zero.
        if any(float(torch.tensor(value)) <= 0 for value in self.std):
            raise InvalidSetting(
                "Normalization.std", self.std, "every value must be positive (1 for a constant channel)"
            )
        if self.zca is not None and self.zca.shape[0] != len(self.mean):
            raise ShapeMismatch("whitened images", self.zca.shape, f"({len(self.mean)}, H, W), as many as the mean")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def standardize(self, images: Tensor) -> Tensor:
        """Standardise images (..., C, H, W): uint8 0..255, or float in [0, 1]; returns float32 of the same shape.

        Without whitening bit-identical to torchvision's ``ToTensor`` and ``Normalize`` on every device: divide by
        255, subtract the mean, divide by the deviation, in this order. Whitening follows it.

        Raises:
            ShapeMismatch: not C channels, or not the size that the whitening was fitted on.
            BadData: another dtype.
        """
        self._check(images)
        if images.is_floating_point():
            unit = images.to(torch.float32)
        elif images.dtype == torch.uint8:
            # A tensor divisor on purpose: CUDA replaces a division by a Python number with a multiplication by
            # its rounded reciprocal, which is one bit off for many of the 256 values.
            unit = images.to(torch.float32) / _constant((255.0,), images.device)
        else:
            raise BadData(f"images have dtype {images.dtype}; give uint8 (0..255) or float (0..1)")
        standardized = (unit - _constant(self.mean, images.device)) / _constant(self.std, images.device)
        return standardized if self.zca is None else self.zca.whiten(standardized)

    def to_unit(self, images: Tensor) -> Tensor:
        """Back from standardised float (..., C, H, W) to the pixel range [0, 1], not clipped; differentiable.

        Raises:
            ShapeMismatch: not C channels, or not the size that the whitening was fitted on.
            BadData: not floating point.
        """
        self._check(images)
        if not images.is_floating_point():
            raise BadData(f"standardised images have dtype {images.dtype}; give a floating point tensor")
        standardized = images if self.zca is None else self.zca.color(images)
        return standardized * _constant(self.std, images.device) + _constant(self.mean, images.device)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Standardised float (..., C, H, W) as uint8: inverse, clipped to 0..255, rounded to the nearest.

        Raises:
            ShapeMismatch: not C channels.
            BadData: not floating point.
        """
        return (self.to_unit(images) * 255).round().clamp(0, 255).to(torch.uint8)

    def whitened(self, chunks: Iterable[Tensor], eps: float = 0.1) -> "Normalization":
        """This standardisation followed by ZCA whitening fitted on uint8 images; see `Whitening.fit`.

        Args:
            chunks: uint8 (n, C, H, W), one after the other, so that they need not fit in memory together.
            eps: added to the eigenvalues of the covariance.

        Raises:
            BadData: fewer than two images, not uint8, mixed shapes or another number of channels.
            InvalidSetting: eps is not positive, or images have too many pixels.
        """
        return replace(self, zca=Whitening.fit(chunks, self.mean, self.std, eps=eps))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON content; with `tensors` what `from_json` needs."""
        plain: dict[str, Any] = {"kind": KIND, "mean": list(self.mean), "std": list(self.std)}
        return plain if self.zca is None else plain | {"kind": ZCA_KIND, **self.zca.to_json()}

    def identity(self) -> dict[str, Any]:
        """Which pixels it makes, up to rounding: plain JSON content, the same on every machine."""
        plain = self.to_json()
        return plain if self.zca is None else plain | {"digest": self.zca.fit_digest}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to save beside `to_json`: those of the whitening; empty without it."""
        return {} if self.zca is None else self.zca.tensors()

    @classmethod
    def from_json(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> "Normalization":
        """Rebuild what `to_json` and `tensors` wrote; other tensors are left alone.

        Raises:
            BadData: another kind, missing or invalid numbers, or matrices that do not match their digest.
        """
        kind = content.get("kind") if isinstance(content, Mapping) else content
        if kind not in (KIND, ZCA_KIND):
            raise BadData(f"normalization of kind {kind!r} is not known; this version reads {KIND!r} and {ZCA_KIND!r}")
        zca = Whitening.from_json(content, tensors or {}) if kind == ZCA_KIND else None
        try:
            return cls(content["mean"], content["std"], zca)
        except KeyError as error:
            raise BadData(f"normalization has no {error.args[0]!r}; it needs 'mean' and 'std'") from None
        except InvalidSetting as error:
            raise BadData(f"normalization cannot be read: {error}") from None

    @classmethod
    def measure(cls, images: Tensor) -> "Normalization":
        """Mean and population standard deviation of every channel of uint8 images (N, C, H, W).

        Exact: taken from integer histograms, so neither chunking nor the device matters. A constant channel
        gets the deviation 1.

        Raises:
            ShapeMismatch: not four dimensions, or no pixels.
            BadData: not uint8.
        """
        if images.ndim != 4 or images.numel() == 0:
            raise ShapeMismatch("images to measure", tuple(images.shape), "(N, C, H, W) with at least one pixel")
        if images.dtype != torch.uint8:
            raise BadData(f"images to measure have dtype {images.dtype}; give uint8 (0..255)")
        return cls.of_histograms([_histogram(images[:, channel]) for channel in range(images.shape[1])])

    @classmethod
    def of_histograms(cls, histograms: Sequence[Sequence[int]]) -> "Normalization":
        """As `measure`, from how often each channel takes each of the values 0 to 255."""
        moments = [_moments(counts) for counts in histograms]
        return cls(tuple(mean for mean, _ in moments), tuple(std or 1.0 for _, std in moments))

    def _check(self, images: Tensor) -> None:
        if images.ndim < 3 or images.shape[-3] != self.channels:
            raise ShapeMismatch("images", tuple(images.shape), f"(..., {self.channels}, H, W)")


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise InvalidSetting(name, values, "must be a non-empty sequence of numbers, one per channel")
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise InvalidSetting(name, values, "every value must be a number")
    if not all(math.isfinite(value) for value in values):
        raise InvalidSetting(name, values, "every value must be finite")
    return tuple(float(value) for value in values)


def _histogram(pixels: Tensor) -> list[int]:
    histogram = torch.zeros(256, dtype=torch.int64)
    for chunk in torch.split(pixels, 4096):
        histogram += torch.bincount(chunk.reshape(-1), minlength=256).cpu()
    return histogram.tolist()


def _moments(counts: Sequence[int]) -> tuple[float, float]:
    """Mean and population deviation of uint8 pixels, in units of 255, from how often each value occurs."""
    total = sum(counts)
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    # Python integers: the difference below is exact, where floats would cancel.
    return first / (total * 255), math.sqrt((total * second - first * first) / (total * total)) / 255


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values as float32 (C, 1, 1) on a device, uploaded once."""
    # Not an inference tensor even when first asked for in inference mode: autograd must be able to save it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
