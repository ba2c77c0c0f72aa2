"""How a network is trained: a plain record of settings."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from dsdistill.augmentations import Augmentation, Mix
from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting
from dsdistill.training.distillation import Distillation


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Training with cross-entropy or from a teacher's logits, and a schedule of the step size.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    epochs: Annotated[int, Ge(1)] = 20
    """Passes over the set."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per step; the last batch of an epoch may be smaller."""
    sub_batches: Annotated[int, Ge(1)] = 1
    """Nearly equal parts in which a batch passes, one step for all: batch norms take the statistics of each part."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """What makes the steps."""
    lr: Annotated[float, Gt(0)] = 0.01
    """Full step size."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """SGD momentum, kept when the step size drops; Adam and AdamW have their usual moments instead."""
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    """L2 penalty of SGD and Adam; of AdamW, the decoupled decay."""
    decay_only_weights: bool = False
    """Decay only parameters of two or more dimensions with "weight" in their name: no biases, no scales of norms."""
    schedule: Literal["steps", "cosine"] = "steps"
    """How the step size falls: by ``gamma`` after each of ``milestones``, or along a cosine, epoch by epoch."""
    slowdown: Annotated[float, Gt(0)] = 1.0
    """η of the cosine lr / 2 · (1 + cos(π e / (η E))): 1 ends at 0, 2 at half of lr, and below 1 it comes up again."""
    warmup: Annotated[int, Ge(0)] = 0
    """Epochs in which the step size first rises linearly; the cosine goes over those that remain."""
    warmup_start: Annotated[float, Gt(0), Le(1)] = 0.01
    """Part of lr with which that rise begins."""
    milestones: tuple[float, ...] = (0.5,)
    """Fractions of the epochs after which the step size is multiplied by gamma."""
    milestone_delay: Annotated[int, Ge(0)] = 0
    """Epochs that pass after a milestone before the step size drops."""
    gamma: Annotated[float, Gt(0), Le(1)] = 0.1
    """Factor of the schedule."""
    augmentation: Augmentation | None = None
    """Views of the training images, drawn anew for each image; flips are left out where they change the class."""
    mix: Mix | None = None
    """Mixing of the images and labels of a mini-batch, after the views: CutMix or Mixup."""
    distillation: Distillation | None = None
    """Learn from a teacher's logits instead of from classes, and by which loss."""

    def __post_init__(self) -> None:
        validate(self)
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise InvalidSetting(
                f"{type(self).__name__}.milestones", self.milestones, "ascending fractions between 0 and 1"
            )

    def learning_rate(self, epoch: int) -> float:
        """Step size during ``epoch`` (counted from 0); without a warm-up the first epoch has the full one."""
        if epoch < self.warmup:
            return self.lr * (self.warmup_start + (1 - self.warmup_start) * epoch / self.warmup)
        if self.schedule == "cosine":
            turn = (epoch - self.warmup) / (self.slowdown * max(1, self.epochs - self.warmup))
            return self.lr / 2 * (1 + math.cos(math.pi * turn))
        drops = [max(1, int(self.epochs * m + 1e-6)) + self.milestone_delay for m in self.milestones]
        passed = sum(epoch >= drop for drop in drops)
        return float(self.lr * self.gamma**passed)
