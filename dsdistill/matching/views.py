"""Siamese views: what the real images of a class are shown through, its synthetic ones are too."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dsdistill.augmentations import Augmentation, Views
from dsdistill.engine import Run


@dataclass(frozen=True)
class ClassViews:
    """One view for each class of a run; without an augmentation, images are shown as they are."""

    augmentation: Augmentation | None
    record: Views | None

    @classmethod
    def drawn(cls, augmentation: Augmentation | None, run: Run, iteration: int) -> Self:
        """Fresh views from the stream "views"; flips are left out where they change the class."""
        suited = augmentation.suited(run.source.mirror_safe) if augmentation else None
        if suited is None:
            return cls(None, None)
        generator = run.rng.at("views", iteration, device="cpu")
        shape = run.source.shape
        return cls(suited, suited.sample(len(run.classes), shape, generator, per="class", device=run.device))

    def show(self, images: Tensor, owner: Tensor) -> Tensor:
        """Images (M, C, H, W) under the view of their class; ``owner`` (M,), on the CPU, is its position in the run."""
        if self.augmentation is None or self.record is None:
            return images
        return self.augmentation.apply(images, self.record, owner)
