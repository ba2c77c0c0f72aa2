"""How the stored tensors become images."""

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from dsdistill.core.stored import Stored


class Decoded(NamedTuple):
    """Images made from stored items.

    ``images``: (M, C, H, W), float32, standardised. ``owner``: (M,), int64, on the CPU so that nobody waits for
    a device to learn who is who: the stored item of each image; M
    may exceed the number of items asked for (tiles, mirrored pairs).
    """

    images: Tensor
    owner: Tensor


class Parameterization(Stored):
    """What is learned instead of plain pixels, and how it becomes images.

    Parameters of this module are what the optimiser of the images updates.
    """

    @abstractmethod
    def decode(self, index: Tensor | None = None) -> Decoded:
        """Images of the stored items at ``index`` (int64, on the CPU), all items if None; differentiable."""

    def constrain(self) -> None:
        """Projection after an update (a pixel range, say); nothing by default."""
