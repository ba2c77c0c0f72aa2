"""Learning from the logits of teachers (Hinton, Vinyals & Dean, arXiv 1503.02531)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting, ShapeMismatch


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss of a student that learns from a teacher's logits.

    (1 − hard_share) · KL(softmax(z_t / T) ‖ softmax(z_s / T)) + hard_share · cross-entropy with the classes, where the
    first is multiplied by T² if ``squared``. SRe2L (Yin, Xing & Shen, arXiv 2306.13092) and what follows it take the
    first alone, without T²: AdamW does not see a constant factor, but SGD trains T² times slower without it.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    temperature: Annotated[float, Gt(0)] = 20.0
    """T, by which the logits of both are divided."""
    squared: bool = False
    """Multiply the divergence by T², so that its gradient does not shrink as T grows."""
    hard_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of plain cross-entropy with the classes, mixed where the images are."""

    def __post_init__(self) -> None:
        validate(self)

    def loss(self, logits: Tensor, teacher: Tensor, classes: Tensor | None = None) -> Tensor:
        """Sum over the images of a batch; divided by their number it is what the papers call "batchmean".

        Args:
            logits: of the student, (B, K).
            teacher: logits (B, K) of the same views.
            classes: (B,) classes or (B, K) probabilities; read only where ``hard_share`` is above 0.

        Returns:
            A scalar.

        Raises:
            ShapeMismatch: the logits differ in shape.
            InvalidSetting: ``hard_share`` is above 0, but there are no classes.
        """
        if teacher.shape != logits.shape:
            raise ShapeMismatch(
                "logits of the teacher", tuple(teacher.shape), f"{tuple(logits.shape)} as the student's"
            )
        if self.hard_share == 0:
            return self._divergence(logits, teacher)
        if classes is None:
            raise InvalidSetting(
                "Distillation.hard_share", self.hard_share, "lessons that carry classes, or 0 where they have none"
            )
        hard = cross_entropy(logits, classes, reduction="sum")
        return (1 - self.hard_share) * self._divergence(logits, teacher) + self.hard_share * hard

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        wanted = torch.log_softmax(teacher / self.temperature, 1)
        given = torch.log_softmax(logits / self.temperature, 1)
        divergence = kl_div(given, wanted, reduction="sum", log_target=True)
        return divergence * self.temperature**2 if self.squared else divergence
