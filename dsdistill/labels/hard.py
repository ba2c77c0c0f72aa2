"""One class per stored image, fixed."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dsdistill.errors import BadData, InvalidSetting
from dsdistill.labels.base import Labels

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class HardLabels(Labels):
    """Class indices (N,), stored as int32.

    Args:
        classes: (N,), integers in [0, num_classes).
        num_classes: K, of the whole task, also when some class has no image here.

    Raises:
        BadData: not one-dimensional, not integer, or out of range.
    """

    key = "hard"

    def __init__(self, classes: Tensor, num_classes: int) -> None:
        super().__init__()
        if classes.dim() != 1 or classes.dtype not in _INTEGERS:
            raise BadData(f"hard labels must be (N,) integers, got {tuple(classes.shape)} {classes.dtype}")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise BadData(
                f"hard labels span [{int(classes.min())}, {int(classes.max())}], but there are {num_classes} classes"
            )
        self.num_classes = num_classes
        self._host = classes.detach().to("cpu", torch.int64, copy=True)
        self._classes: Tensor
        self.register_buffer("_classes", classes.detach().to(torch.int64, copy=True))

    @property
    def count(self) -> int:
        return len(self._classes)

    @property
    def classes(self) -> Tensor:
        return self._host

    def target(self, owner: Tensor) -> Tensor:
        return self._classes.index_select(0, owner.to(self._classes.device, non_blocking=True))

    def tensors(self) -> dict[str, Tensor]:
        return {"classes": self._classes.to(torch.int32)}

    def settings(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        if set(tensors) != {"classes"}:
            raise BadData(f"hard labels need one tensor 'classes', got {sorted(tensors)}")
        if not isinstance(settings.get("num_classes"), int):
            raise InvalidSetting("num_classes", settings.get("num_classes"), "the number of classes, an integer")
        return cls(tensors["classes"], settings["num_classes"])

    def subset(self, index: Tensor) -> Self:
        return type(self)(self.target(index), self.num_classes)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part._classes for part in parts]), parts[0].num_classes)
