"""Labels of two numbers an image: how far the teacher takes a mixed view to be from each of its two classes.

NRR-DD's distance-based representation ("DBR"): for a mixed view x of an image of class a and its partner of class b,
d_org = -log p_a(x) and d_aug = -log p_b(x). The loss of a student s with the teacher t is

    CE(s, λ 1_a + (1 - λ) 1_b) + weight · (|d_org(s) - d_org(t)| + |d_aug(s) - d_aug(t)|)

with λ the share of pixels that the view has of its own image. The paper's norm and weight were not at hand: L1 and 1.
Where a batch was not mixed (λ = 1), d_aug is still the distance to the class of the partner that was drawn: it says as
much of the teacher as any class does.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.training import Distillation


def class_distances(logits: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """(d_org, d_aug) of each view.

    Args:
        logits: (B, K).
        own: (B,) int64, the class of each image.
        partner: (B,) int64, the class of what was mixed into it.

    Returns:
        (B, 2), not negative.
    """
    return torch.stack([cross_entropy(logits, classes, reduction="none") for classes in (own, partner)], 1)


def distance_loss(logits: Tensor, distances: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """How far a student's distances are from a teacher's: L1 of the two, sum over images; 0 where they agree.

    Args:
        logits: (B, K), the student's.
        distances: (B, 2), the teacher's; see `class_distances`.
        own: (B,) int64, the class of each image.
        partner: (B,) int64, the class of what was mixed into it.
    """
    return (class_distances(logits, own, partner) - distances).abs().sum()


def lesson_targets(distances: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """Distances (B, 2) and the classes they are to, as the targets (B, 4), float32, of a lesson for `Distances`."""
    return torch.cat([distances.float(), own[:, None].float(), partner[:, None].float()], 1)


@dataclass(frozen=True, kw_only=True)
class Distances(Distillation):
    """The loss of a student that learns from distances; its lessons have `lesson_targets` and classes.

    Of what a `Distillation` has, nothing else applies: temperature, squared and hard_share stay as they are.

    Raises:
        InvalidSetting: a field is out of range, or one of those was set.
    """

    weight: Annotated[float, Ge(0)] = 1.0
    """Of the distances beside the cross-entropy with the classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "squared", "hard_share"):
            if getattr(self, name) != getattr(Distillation, name):
                raise InvalidSetting(f"Distances.{name}", getattr(self, name), "left out: distances have none")

    def loss(self, logits: Tensor, teacher: Tensor, classes: Tensor | None = None) -> Tensor:
        """Sum over the images of a batch.

        Args:
            logits: of the student, (B, K).
            teacher: `lesson_targets` (B, 4) of the same views.
            classes: (B,) classes or (B, K) probabilities, mixed by the share of pixels.

        Raises:
            ShapeMismatch: ``teacher`` is something else. InvalidSetting: there are no classes.
        """
        if tuple(teacher.shape) != (len(logits), 4):
            raise ShapeMismatch("distances of the teacher", tuple(teacher.shape), f"{(len(logits), 4)}")
        if classes is None:
            raise InvalidSetting("classes", None, "lessons that carry classes: distances are learned beside them")
        own, partner = teacher[:, 2].long(), teacher[:, 3].long()
        hard = cross_entropy(logits, classes, reduction="sum")
        return hard + self.weight * distance_loss(logits, teacher[:, :2], own, partner)
