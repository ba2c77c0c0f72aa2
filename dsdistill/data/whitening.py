"""ZCA whitening: decorrelate the pixels of whole images, as close to the originals as that allows.

    standardised x of D = C * H * W pixels  ->  (x - mean) U (S + eps)^(-1/2) U^T

with U, S the eigenvectors and eigenvalues of the pixels' covariance (Krizhevsky, Learning Multiple Layers of Features
from Tiny Images, 2009; kornia computes the two matrices). Published code has two conventions, both with eps 0.1,
and they give different spaces: DataDAM (arXiv 2310.00093) whitens pixels already standardised per channel, MTT
(arXiv 2203.11932) whitens pixels in [0, 1]. Statistics come from the train split alone; initial images, saved sets
and the test split live in the whitened space.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

if TYPE_CHECKING:
    from dsdistill.data.source import ImageSource

logger = logging.getLogger("dsdistill")

MAX_PIXELS = 12288
"""Largest D = C * H * W that is fitted: 3 x 64 x 64. Time grows with its cube, memory with its square."""

_NAMES = ("mean", "transform", "inverse")


class Moments(NamedTuple):
    """Statistics of uint8 images, in units of 255: how many, mean (D,) and unbiased covariance (D, D), float64."""

    images: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Whitening:
    """The fitted transform; equal to another when all numbers are.

    Attributes:
        mean: float32 (D,), of the pixels to be whitened.
        transform: float32 (D, D), symmetric.
        inverse: float32 (D, D), of ``transform``.
        shape: (C, H, W) of an image, D = C * H * W.
        eps: what was added to the eigenvalues.

    Raises:
        BadData: other shapes or dtypes, or a number that is not finite.
        InvalidSetting: eps is not positive.
    """

    mean: Tensor
    transform: Tensor
    inverse: Tensor
    shape: tuple[int, int, int]
    eps: float

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        size = math.prod(self.shape)
        for name, expected in zip(_NAMES, ((size,), (size, size), (size, size)), strict=True):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != expected:
                raise ShapeMismatch(f"whitening {name}", tuple(tensor.shape), f"{expected} for images of {self.shape}")
            if tensor.dtype != torch.float32:
                raise BadData(f"whitening {name} has dtype {tensor.dtype}; give float32")
            if not bool(torch.isfinite(tensor).all()):
                raise BadData(f"whitening {name} holds numbers that are not finite; fit it again")
            # Autograd must be able to save them, wherever they were made.
            with torch.inference_mode(False):
                kept = tensor.detach().cpu().contiguous()
                object.__setattr__(self, name, kept.clone() if kept.is_inference() else kept)

    def __repr__(self) -> str:
        channels, height, width = self.shape
        return f"Whitening({channels}x{height}x{width}, eps={self.eps!r}, digest={self.digest[:12]!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Whitening) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __getstate__(self) -> dict[str, Any]:
        # Copies on accelerators do not travel to other processes.
        return {name: value for name, value in self.__dict__.items() if name != "_placed"}

    @cached_property
    def digest(self) -> str:
        """sha256 of shape, eps and the three tensors."""
        return self._digest_of(*_NAMES)

    @cached_property
    def fit_digest(self) -> str:
        """sha256 of shape, eps and mean: which images `fit` made it of, the same wherever that was done.

        The matrices come out of a decomposition whose last bits depend on the machine and its number of threads; the
        mean is exact.
        """
        return self._digest_of("mean")

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    def whiten(self, images: Tensor) -> Tensor:
        """Whiten float images (..., C, H, W); differentiable, computed in float32 or float64, also under autocast.

        Raises:
            ShapeMismatch: not images of `shape`.
        """
        mean, transform, _ = self._on(images)
        return self._multiply(images, transform, before=mean)

    def color(self, images: Tensor) -> Tensor:
        """Back from whitened float images (..., C, H, W): the inverse of `whiten`; differentiable.

        Raises:
            ShapeMismatch: not images of `shape`.
        """
        mean, _, inverse = self._on(images)
        return self._multiply(images, inverse, after=mean)

    def tensors(self) -> dict[str, Tensor]:
        """The numbers to save beside `to_json`: "zca_mean", "zca_transform", "zca_inverse"."""
        return {f"zca_{name}": getattr(self, name) for name in _NAMES}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON content, without the matrices."""
        return {"shape": list(self.shape), "eps": self.eps, "digest": self.digest}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Whitening":
        """Rebuild what `to_json` and `tensors` gave.

        Raises:
            BadData: something is missing or invalid, or the matrices are not those of the digest.
        """
        absent = [f"zca_{name}" for name in _NAMES if f"zca_{name}" not in tensors]
        if absent:
            raise BadData(f"the whitening matrices are missing ({', '.join(absent)}); they are saved beside the images")
        shape: Any = content.get("shape")
        eps: Any = content.get("eps")
        if not isinstance(shape, Sequence) or len(shape) != 3 or not all(type(side) is int for side in shape):
            raise BadData(f"whitening cannot be read: shape {shape!r} is not (C, H, W)")
        mean, transform, inverse = (tensors[f"zca_{name}"] for name in _NAMES)
        try:
            made = cls(mean, transform, inverse, (shape[0], shape[1], shape[2]), eps)
        except InvalidSetting as error:
            raise BadData(f"whitening cannot be read: {error}") from None
        if made.digest != content.get("digest"):
            raise BadData(
                f"the whitening matrices do not match their digest (sha256 {made.digest[:12]}... for "
                f"{str(content.get('digest'))[:12]}...); restore them, or fit the whitening again"
            )
        return made

    @classmethod
    def fit(
        cls, chunks: Iterable[Tensor], mean: Sequence[float], std: Sequence[float], *, eps: float = 0.1
    ) -> "Whitening":
        """Whitening of uint8 images standardised by ``mean`` and ``std``; needs kornia.

        How the images are cut into chunks, their order and their device do not change a bit of the result; it is a
        function of the images, of the machine's linear algebra library and of its number of threads.

        Args:
            chunks: uint8 (n, C, H, W), one after the other; kept no longer than needed.
            mean: of each channel, in units of the pixel range.
            std: of each channel, in the same units.
            eps: added to the eigenvalues, so that weak directions, mostly noise, are not blown up.

        Raises:
            BadData: fewer than two images, not uint8, or mixed shapes.
            InvalidSetting: eps is not positive, or images have more than MAX_PIXELS pixels.
        """
        _check_eps(eps)
        first, chunks = _peek(chunks)
        shape = (first.shape[1], first.shape[2], first.shape[3])
        if len(mean) != shape[0] or len(std) != shape[0]:
            raise ShapeMismatch("images to whiten", tuple(first.shape), f"(n, {len(mean)}, H, W)")
        raw = moments(chunks)
        area = shape[1] * shape[2]
        means = torch.tensor(mean, dtype=torch.float64).repeat_interleave(area)
        stds = torch.tensor(std, dtype=torch.float64).repeat_interleave(area)
        standardised = (raw.mean - means) / stds
        transform, inverse = transforms(raw.covariance / stds / stds[:, None], eps)
        logger.info("ZCA whitening fitted on %d images of %d pixels", raw.images, math.prod(shape))
        return cls(standardised.float(), transform.float(), inverse.float(), shape, float(eps))

    def _digest_of(self, *names: str) -> str:
        header = json.dumps({"shape": list(self.shape), "eps": self.eps}, sort_keys=True)
        digest = hashlib.sha256(header.encode("ascii") + b"\n")
        for name in names:
            digest.update(getattr(self, name).numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def _on(self, images: Tensor) -> tuple[Tensor, ...]:
        """Mean, transform and inverse on the device and in the precision of images."""
        if tuple(images.shape[-3:]) != self.shape:
            channels, height, width = self.shape
            expected = f"(..., {channels}, {height}, {width}), as the images that the whitening was fitted on"
            raise ShapeMismatch("images", tuple(images.shape), expected)
        if images.device not in self._placed:
            with torch.inference_mode(False):
                self._placed[images.device] = tuple(getattr(self, name).to(images.device) for name in _NAMES)
        dtype = torch.promote_types(images.dtype, torch.float32)
        return tuple(tensor.to(dtype) for tensor in self._placed[images.device])

    def _multiply(
        self, images: Tensor, matrix: Tensor, *, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """(images - before) @ matrix + after, each image one row."""
        flat = images.to(matrix.dtype).flatten(-3)
        # Half precision would lose the weak directions that whitening is about.
        with torch.autocast(images.device.type, enabled=False):
            product = (flat if before is None else flat - before) @ matrix
        return (product if after is None else product + after).reshape(images.shape)


def whiten(source: "ImageSource", eps: float = 0.1, *, standardized: bool = True) -> "ImageSource":
    """The same source, test split included, ZCA-whitened; fitted on its training images. Needs kornia.

    Args:
        source: real images.
        eps: added to the eigenvalues of the covariance.
        standardized: whiten pixels standardised by the source's mean and deviation, as DataDAM does; False whitens
            pixels in [0, 1], as MTT does.

    Raises:
        BadData: a single image.
        InvalidSetting: eps is not positive, or images are too large.
    """
    base = source.normalization
    if not standardized:
        channels = source.shape[0]
        base = replace(base, mean=(0.0,) * channels, std=(1.0,) * channels, zca=None)
    return source.normalized_by(base.whitened(source.store.chunks(), eps))


def moments(chunks: Iterable[Tensor]) -> Moments:
    """Mean and unbiased covariance of the pixels of uint8 images (n, C, H, W), one pass, chunk after chunk.

    Sums of products of bytes are whole numbers below 2^53 for up to 10^11 images, which float64 adds exactly:
    chunks, order and device make no difference.

    Raises:
        BadData: fewer than two images, not uint8, or mixed shapes.
        InvalidSetting: images have more than MAX_PIXELS pixels.
    """
    first, chunks = _peek(chunks)
    size = math.prod(first.shape[1:])
    # Not every accelerator has float64.
    place = torch.device("cpu") if first.device.type == "mps" else first.device
    count, total = 0, torch.zeros(size, dtype=torch.float64, device=place)
    products = torch.zeros(size, size, dtype=torch.float64, device=place)
    for chunk in chunks:
        if chunk.dtype != torch.uint8:
            raise BadData(f"images to whiten have dtype {chunk.dtype}; give uint8 (0..255)")
        if chunk.shape[1:] != first.shape[1:]:
            raise ShapeMismatch("images to whiten", tuple(chunk.shape), f"(n, {', '.join(map(str, first.shape[1:]))})")
        pixels = chunk.flatten(1).to(place, torch.float64)
        count += len(pixels)
        total += pixels.sum(0)
        products.addmm_(pixels.T, pixels)
    if count < 2:
        raise BadData(f"whitening needs at least two images, got {count}")
    # Whole numbers up to here; from here on the CPU rounds, for every device alike.
    total, products = total.cpu(), products.cpu()
    covariance = (products - torch.outer(total, total) / count) / (count - 1)
    return Moments(count, total / (255 * count), covariance / 255**2)


def transforms(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """kornia's ZCA matrix of a covariance (D, D) and its inverse, float64 (D, D) each.

    kornia takes images and not a covariance, so it is given 2 D rows with exactly the covariance wanted: plus and
    minus the columns of a Cholesky factor. That factor needs a positive definite matrix: eps is added before it
    instead of by kornia, which adds it to the eigenvalues, the same thing.

    Raises:
        InvalidSetting: eps is too small beside the covariance's rounding errors.
    """
    from kornia.enhance import ZCAWhitening  # seconds to import, and only needed here

    factor, failed = torch.linalg.cholesky_ex(covariance + eps * torch.eye(len(covariance), dtype=covariance.dtype))
    if int(failed):
        raise InvalidSetting("eps", eps, "too small for these images, whose covariance is singular; published: 0.1")
    rows = factor.T * math.sqrt(len(factor))
    whitening: Any = ZCAWhitening(unbiased=False, eps=0.0, compute_inv=True).fit(torch.cat((rows, -rows)))
    return whitening.transform_matrix, whitening.transform_inv


def _peek(chunks: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first chunk, checked, and all of them."""
    rest = iter(chunks)
    first = next(rest, None)
    if first is None:
        raise BadData("whitening needs at least two images, got 0")
    if first.ndim != 4 or first.numel() == 0:
        raise ShapeMismatch("images to whiten", tuple(first.shape), "(n, C, H, W) with at least one pixel")
    size = math.prod(first.shape[1:])
    if size > MAX_PIXELS:
        raise InvalidSetting(
            "zca",
            "x".join(map(str, first.shape[1:])),
            f"whitening is for images of up to {MAX_PIXELS} values; {size} would need about "
            f"{_peak_bytes(size) / 1e9:.0f} GB of memory. Use a smaller image_size, or no whitening",
        )

    def everything() -> Iterator[Tensor]:
        yield first
        yield from rest

    return first, everything()


def _peak_bytes(size: int) -> int:
    """Memory of a fit: twenty float64 matrices (D, D) as measured, most of them inside the decomposition."""
    return 20 * 8 * size * size


def _check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not (math.isfinite(eps) and eps > 0):
        raise InvalidSetting("eps", eps, "a positive number; published: 0.1")
