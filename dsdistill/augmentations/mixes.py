"""Mixing the images of a batch and their labels: CutMix and Mixup, for training networks on a set."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from dsdistill.augmentations.base import Views
from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting, ShapeMismatch


@dataclass(frozen=True)
class MixViews(Views):
    """Which image is mixed into each of a batch of ``count``, and how much of it."""

    partner: Tensor
    """``(M,)`` int64, a permutation: the image mixed into each one."""
    share: float
    """What each image keeps of itself, 0 .. 1, and its label with it; 1 if the batch is left alone."""
    box: tuple[int, int, int, int] | None = None
    """Of a cut: first row, first column, row and column after the last of the partner's pixels."""


@dataclass(frozen=True)
class Mix(ABC):
    """Mixes the images of a mini-batch in pairs, all by the same share; subclasses are frozen settings."""

    probability: Annotated[float, Ge(0), Le(1)] = 1.0
    """How often a mini-batch is mixed; the others are left alone."""
    alpha: Annotated[float, Gt(0)] = 1.0
    """Both parameters of the Beta distribution of the share; 1 is uniform."""

    def __post_init__(self) -> None:
        validate(self)

    def sample(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
    ) -> MixViews:
        """Draw a record for one mini-batch.

        Args:
            count: number of images, M.
            shape: ``(C, H, W)`` of one image.
            generator: a generator on the CPU, whatever the device of the images.
            device: where the partners are needed; None leaves them on the CPU.

        Raises:
            InvalidSetting: the generator is not on the CPU, or there is no image.
        """
        if generator.device.type != "cpu":
            raise InvalidSetting("generator", str(generator.device), "pass a generator on the CPU")
        if count < 1:
            raise InvalidSetting("count", count, "there must be at least one image")
        # Always the same number of draws, so that what follows does not depend on whether a batch is mixed.
        whether, quantile, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        partner = torch.randperm(count, generator=generator)
        if device is not None:
            partner = partner.to(device, non_blocking=True)
        if whether >= self.probability:
            return MixViews(shape, count, partner, 1.0)
        return self._mixed(shape, partner, _beta(quantile, self.alpha), (down, right))

    @abstractmethod
    def _mixed(
        self, shape: tuple[int, int, int], partner: Tensor, share: float, place: tuple[float, float]
    ) -> MixViews:
        """The record for a drawn ``share`` and a ``place`` uniform in [0, 1) both ways."""

    def apply(self, images: Tensor, views: MixViews) -> Tensor:
        """Mix images as recorded; pure, and differentiable in the images.

        Args:
            images: ``(M, C, H, W)``.
            views: a record of `sample`.

        Returns:
            ``(M, C, H, W)`` of the same type; the images themselves if the record leaves them alone.

        Raises:
            ShapeMismatch: the images do not fit the record.
        """
        if tuple(images.shape) != (views.count, *views.shape):
            raise ShapeMismatch("images", tuple(images.shape), f"{(views.count, *views.shape)} as in the record")
        if views.share == 1:
            return images
        return self._blend(images, images.index_select(0, views.partner.to(images.device, non_blocking=True)), views)

    @abstractmethod
    def _blend(self, images: Tensor, partners: Tensor, views: MixViews) -> Tensor:
        """``images`` and ``partners``, both ``(M, C, H, W)``, mixed as recorded."""

    def targets(self, targets: Tensor, views: MixViews, num_classes: int) -> Tensor:
        """Labels of the mixed images.

        Args:
            targets: ``(M,)`` class indices, or ``(M, num_classes)`` probabilities.
            views: the record applied to the images.
            num_classes: number of classes, K.

        Returns:
            ``(M, num_classes)`` probabilities, float32 or of the type of those given.

        Raises:
            ShapeMismatch: the targets do not fit the record.
        """
        count = views.count
        if tuple(targets.shape) not in ((count,), (count, num_classes)):
            raise ShapeMismatch("targets", tuple(targets.shape), f"{(count,)} or {(count, num_classes)}")
        soft = targets if targets.dim() == 2 else F.one_hot(targets, num_classes).float()
        if views.share == 1:
            return soft
        partners = soft.index_select(0, views.partner.to(soft.device, non_blocking=True))
        return soft * views.share + partners * (1 - views.share)


@dataclass(frozen=True)
class CutMix(Mix):
    """One rectangle of every image comes from its partner (Yun et al., arXiv 1905.04899).

    Its sides are sqrt(1 - λ) of the image's, λ ~ Beta(alpha, alpha), rounded down to an even number of pixels; its
    centre is uniform, and what lies outside is clipped. The share is what is really left of an image. The default
    probability is that of IDC (Kim et al., arXiv 2205.14959) on small images.
    """

    probability: Annotated[float, Ge(0), Le(1)] = 0.5
    """How often a mini-batch is mixed; the others are left alone."""

    def _mixed(
        self, shape: tuple[int, int, int], partner: Tensor, share: float, place: tuple[float, float]
    ) -> MixViews:
        spans = [_span(size, share, at) for size, at in zip(shape[1:], place, strict=True)]
        (top, bottom), (left, right) = spans
        kept = 1 - (bottom - top) * (right - left) / (shape[1] * shape[2])
        return MixViews(shape, len(partner), partner, kept, (top, left, bottom, right))

    def _blend(self, images: Tensor, partners: Tensor, views: MixViews) -> Tensor:
        if views.box is None:
            raise InvalidSetting("views", views, "a record that CutMix.sample drew")
        top, left, bottom, right = views.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed


@dataclass(frozen=True)
class Mixup(Mix):
    """Every pixel is the weighted mean of an image's and its partner's (Zhang et al., arXiv 1710.09412)."""

    def _mixed(
        self, shape: tuple[int, int, int], partner: Tensor, share: float, place: tuple[float, float]
    ) -> MixViews:
        return MixViews(shape, len(partner), partner, share)

    def _blend(self, images: Tensor, partners: Tensor, views: MixViews) -> Tensor:
        if views.box is not None:
            raise InvalidSetting("views", views, "a record that Mixup.sample drew")
        return images * views.share + partners * (1 - views.share)


def _beta(quantile: float, alpha: float) -> float:
    """The value below which Beta(alpha, alpha) has the probability ``quantile``."""
    if alpha == 1:
        return quantile
    from scipy.special import betaincinv

    return float(betaincinv(alpha, alpha, quantile))


def _span(size: int, share: float, at: float) -> tuple[int, int]:
    """Begin and end of a box along an axis of ``size`` pixels, centred at pixel ``at * size`` and clipped."""
    half, centre = int(size * (1 - share) ** 0.5) // 2, int(at * size)
    return max(0, centre - half), min(size, centre + half)
