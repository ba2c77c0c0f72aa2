"""Learnable soft labels: a probability for every class, as learned beside the images (Guo et al., arXiv 2310.05773)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsdistill.errors import BadData, InvalidSetting
from dsdistill.labels.base import Labels
from dsdistill.labels.hard import HardLabels


class SoftLabels(Labels):
    """Logits (N, K), float32, as one parameter; the target of an image is their softmax.

    Each item also keeps the class it was made for, which learning does not change: it says where the item belongs in
    subsets and tables, also when the largest probability has moved elsewhere.

    Args:
        logits: (N, K).
        classes: (N,), integers in [0, K): the class each item was made for.

    Raises:
        BadData: shapes or types do not fit, or a logit is not finite.
    """

    key = "soft"

    def __init__(self, logits: Tensor, classes: Tensor) -> None:
        super().__init__()
        if logits.dim() != 2 or not logits.is_floating_point() or len(logits) != len(classes):
            raise BadData(
                f"soft labels must be (N, K) floating-point logits, one row for each of {len(classes)} classes, "
                f"got {tuple(logits.shape)} {logits.dtype}"
            )
        if not bool(torch.isfinite(logits).all()):
            raise BadData("soft labels hold NaN or infinity")
        self.num_classes = logits.shape[1]
        self.logits = nn.Parameter(logits.detach().to(torch.float32, copy=True))
        self._made_for = HardLabels(classes, self.num_classes)

    @classmethod
    def from_hard(cls, labels: HardLabels, confidence: float = 0.99) -> Self:
        """Start from hard labels: probability ``confidence`` for the class, the rest shared evenly.

        Raises:
            InvalidSetting: ``confidence`` is not above 1 / K and below 1.
        """
        others = labels.num_classes - 1
        if not 1 / labels.num_classes < confidence < 1:
            raise InvalidSetting("confidence", confidence, f"above 1/{labels.num_classes} and below 1")
        gap = torch.log(torch.tensor(confidence * others / (1 - confidence)))
        one_hot = nn.functional.one_hot(labels.classes, labels.num_classes)
        return cls(one_hot * gap, labels.classes)

    @property
    def count(self) -> int:
        return len(self.logits)

    @property
    def classes(self) -> Tensor:
        return self._made_for.classes

    def target(self, owner: Tensor) -> Tensor:
        """(M, K) probabilities, differentiable in the logits."""
        return self.logits.index_select(0, owner.to(self.logits.device, non_blocking=True)).softmax(1)

    def tensors(self) -> dict[str, Tensor]:
        return {"logits": self.logits.detach(), **self._made_for.tensors()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        if set(tensors) != {"logits", "classes"}:
            raise BadData(f"soft labels need the tensors 'classes' and 'logits', got {sorted(tensors)}")
        return cls(tensors["logits"], tensors["classes"])

    def subset(self, index: Tensor) -> Self:
        rows = index.to(self.logits.device)
        return type(self)(self.logits.index_select(0, rows), self.classes[index.cpu()])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.logits for part in parts]), torch.cat([part.classes for part in parts]))
