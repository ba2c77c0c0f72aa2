"""How a network is trained: a plain record of settings."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from dsdistill.augmentations import Augmentation, Mix
from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Training with cross-entropy and a step schedule.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    epochs: Annotated[int, Ge(1)] = 20
    """Passes over the set."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per step; the last batch of an epoch may be smaller."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """What makes the steps."""
    lr: Annotated[float, Gt(0)] = 0.01
    """Initial step size."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """SGD momentum, kept when the step size drops; AdamW has its usual moments instead."""
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    """L2 penalty of SGD; of AdamW, the decoupled decay."""
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

    def __post_init__(self) -> None:
        validate(self)
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise InvalidSetting(
                f"{type(self).__name__}.milestones", self.milestones, "ascending fractions between 0 and 1"
            )

    def learning_rate(self, epoch: int) -> float:
        """Step size during ``epoch`` (counted from 0); the first epoch has the full one."""
        drops = [max(1, int(self.epochs * m + 1e-6)) + self.milestone_delay for m in self.milestones]
        passed = sum(epoch >= drop for drop in drops)
        return float(self.lr * self.gamma**passed)
