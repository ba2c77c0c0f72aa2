"""The contract of augmentations: all randomness in `sample`, none in `apply`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsdistill.errors import ShapeMismatch


@dataclass(frozen=True)
class Views:
    """A record of what to do to the images of each of G groups; what is in it is its augmentation's own business.

    Applying the same record twice gives the same views, which is how a real and a synthetic batch share them.
    """

    shape: tuple[int, int, int]
    """``(C, H, W)`` of the images the record was drawn for."""
    count: int
    """Number of groups, G."""

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Augmentation(ABC):
    """A family of random views of images; subclasses are frozen settings."""

    @abstractmethod
    def sample(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        per: Literal["class", "image"] = "class",
        device: torch.device | str | None = None,
    ) -> Views:
        """Draw a record for ``count`` groups.

        Args:
            count: number of classes (``per="class"``) or of images (``per="image"``).
            shape: ``(C, H, W)`` of one image.
            generator: a generator on the CPU, whatever the device of the images.
            per: "class" draws everything anew for each group, for matching: all images of a class, real and
                synthetic, get the same view. "image" is for training and evaluation: what is shared by a
                mini-batch (the operation, here) is drawn once, the parameters independently for each image.
            device: where the parameters are needed; None leaves them on the CPU.

        Raises:
            InvalidSetting: the generator is not on the CPU.
        """

    @abstractmethod
    def apply(self, images: Tensor, views: Views, owner: Sequence[int] | Tensor | None = None) -> Tensor:
        """Show images as recorded; pure, and differentiable in the images any number of times.

        Args:
            images: ``(M, C, H, W)``, standardised: 0 fills vacated pixels and is the mean colour.
            views: a record of `sample`.
            owner: ``(M,)`` the group of each image, best as a list or CPU tensor (one on another device has to be
                waited for); None if image i belongs to group i.

        Returns:
            ``(M, C, H, W)`` of the same type.

        Raises:
            ShapeMismatch: images or owner do not fit the record.
        """

    @abstractmethod
    def suited(self, mirror_safe: bool) -> "Augmentation | None":
        """This augmentation without mirroring if mirrored images change their class; None if nothing remains."""


def groups_of(images: Tensor, views: Views, owner: Sequence[int] | Tensor | None) -> Tensor:
    """The record of each of images ``(M, C, H, W)``, ``(M,)`` on the CPU; ``owner`` as `Augmentation.apply` takes it.

    Raises:
        ShapeMismatch: images or owner do not fit the record.
    """
    if images.dim() != 4 or tuple(images.shape[1:]) != views.shape:
        raise ShapeMismatch("images", tuple(images.shape), f"(M, {', '.join(map(str, views.shape))}) as in the record")
    groups = torch.arange(len(views)) if owner is None else torch.as_tensor(owner, device="cpu", dtype=torch.int64)
    if groups.shape != images.shape[:1]:
        what = "views" if owner is None else "owner"
        raise ShapeMismatch(what, tuple(groups.shape), f"({len(images)},), one group per image")
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(views):
        raise ShapeMismatch(
            "views", (len(views),), f"(G,), a record for each owner in {int(groups.min())} .. {int(groups.max())}"
        )
    return groups
