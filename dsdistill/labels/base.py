"""What the synthetic images teach: a target for every decoded image."""

from abc import abstractmethod

from torch import Tensor

from dsdistill.core.stored import Stored


class Labels(Stored):
    """Targets of the stored items. ``num_classes`` is K; `classes` gives each item's class whatever the kind."""

    num_classes: int

    @property
    @abstractmethod
    def classes(self) -> Tensor:
        """(N,), int64, on the CPU (who belongs where is the host's business): the class of each stored item."""

    @abstractmethod
    def target(self, owner: Tensor) -> Tensor:
        """Targets of decoded images by their stored item.

        Args:
            owner: (M,), int64, on the CPU, as `Parameterization.decode` returns it.

        Returns:
            (M,) classes, or (M, K) probabilities.
        """
