"""How experts are trained: what recipes of trajectory methods share.

An expert is one vector θ (P,), and a recipe says in which direction it goes. Its step is that of SGD (rate lr, momentum
μ, L2 penalty)::

    v ← μ v + d(θ; B) + decay·θ,    θ ← θ − lr·v

A recipe is a function of θ, so that one training loop serves all of them and several experts can be trained as one
stacked computation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from dsdistill.augmentations import Augmentation, Siamese
from dsdistill.core.config import to_dict, validate
from dsdistill.core.device import in_parts
from dsdistill.networks import FlatNetwork


class Batch(NamedTuple):
    """A mini-batch of real images: ``clean`` (B, C, H, W), as ``shown`` under views, and their classes (B,)."""

    clean: Tensor
    shown: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Learner:
    """Gradients of a network's losses with respect to its parameters θ.

    Args:
        network: without dropout.
        chunk: images that pass at a time, None for all; the gradients of chunks add up.
        pure: it is called inside `torch.func.vmap` or compiled, where autograd cannot be asked. Elsewhere that is
            quicker on the CPU, by about a quarter.
    """

    network: FlatNetwork
    chunk: int | None = None
    pure: bool = False

    def gradient(self, loss: Callable[..., Tensor], theta: Tensor, *images: Tensor) -> Tensor:
        """Gradient (P,) in θ of ``loss(theta, *images)``, which must be a sum over the rows of its other arguments."""
        total = torch.zeros_like(theta)
        size = self.chunk or len(images[0])
        for parts in zip(*(in_parts(tensor, size) for tensor in images), strict=True):
            total = total + self._of_part(loss, theta, parts)
        return total

    def _of_part(self, loss: Callable[..., Tensor], theta: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        if self.pure:
            gradient: Tensor = torch.func.grad(loss)(theta, *parts)
            return gradient
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, *parts), leaf)[0]

    def slope(self, theta: Tensor, batch: Batch) -> Tensor:
        """Gradient (P,) of the mean cross-entropy ℓ of a batch as shown."""
        count = len(batch.targets)

        def loss(theta: Tensor, shown: Tensor, targets: Tensor) -> Tensor:
            return self.network.loss(theta, shown, targets) / count

        return self.gradient(loss, theta, batch.shown, batch.targets)


@dataclass(frozen=True, kw_only=True)
class ExpertTraining(ABC):
    """How an expert is trained on the real images.

    Args of a subclass:
        continues: experts of few epochs are the beginning of those of more, as no schedule depends on ``epochs``; so
            both share what is stored. Not inherited: a subclass may bring such a schedule.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    continues: ClassVar[bool] = False

    epochs: Annotated[int, Ge(1)] = 50
    """Passes over the images at most: experts are trained for as many as are asked for."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per step; the last batch of an epoch may be smaller."""
    lr: Annotated[float, Gt(0)] = 0.01
    """Step size."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    """SGD momentum."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """L2 penalty."""
    augmentation: Augmentation | None = Siamese()
    """Views of the images, drawn anew for each image; flips are left out where they change the class."""

    def __init_subclass__(cls, *, continues: bool = False, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.continues = continues

    def __post_init__(self) -> None:
        validate(self)

    @abstractmethod
    def direction(self, learner: Learner, theta: Tensor, batch: Batch, factor: Tensor) -> Tensor:
        """What a step goes against, (P,), at θ (P,); a pure function, which may be stacked and compiled.

        Args:
            learner: gives gradients.
            theta: θ (P,).
            batch: of real images.
            factor: `loss_factor` of the epoch, a scalar.
        """

    def loss_factor(self, epoch: int) -> float:
        """Factor of the loss during ``epoch`` (counted from 0), for recipes that have one."""
        return 1.0

    def learning_rate(self, epoch: int) -> float:
        """Step size during ``epoch``."""
        return self.lr

    def restarts(self, epoch: int) -> bool:
        """Whether ``epoch`` begins without momentum."""
        return epoch == 0

    def identity(self) -> dict[str, Any]:
        """What trajectories depend on: all settings, but ``epochs`` only where fewer are not the beginning of more."""
        return {name: value for name, value in to_dict(self).items() if name != "epochs" or not self.continues}
