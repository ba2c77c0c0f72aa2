"""What a parameterisation and a set of labels have in common: they are stored, cut and joined."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class Stored(nn.Module, ABC):
    """A module that is its own file format.

    ``key`` names the class in a closed table, so that a saved set is decoded without the code of the method
    that made it.
    """

    key: ClassVar[str]

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of stored items N (images, or labels)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk and counted in bytes."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """Rebuild from `tensors` and `settings`.

        Raises:
            ShapeMismatch, InvalidSetting: the content does not fit this class.
        """

    def settings(self) -> dict[str, Any]:
        """JSON content needed beside the tensors."""
        return {}

    @abstractmethod
    def subset(self, index: Tensor) -> Self:
        """The items at ``index`` (int64, (M,)), copied."""

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Parts one after the other; all must have the same settings."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
