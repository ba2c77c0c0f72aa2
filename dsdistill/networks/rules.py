"""Optimisers as functions: a step that can be differentiated in everything it is given.

The numbers are those of `torch.optim`, which updates in place and therefore cannot be differentiated.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting

Moments = tuple[Tensor, ...]
"""What a rule remembers between steps, each of the shape of the parameters."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """How a gradient becomes a step."""

    def __post_init__(self) -> None:
        validate(self)

    @abstractmethod
    def start(self, parameters: Tensor) -> Moments:
        """What is remembered before the first step."""

    @abstractmethod
    def step(
        self, parameters: Tensor, gradient: Tensor, moments: Moments, rate: Tensor, number: int
    ) -> tuple[Tensor, Moments]:
        """Parameters and moments after step ``number``, counted from 0.

        Args:
            parameters: of any shape; ``gradient`` and each of ``moments`` have the same.
            rate: the step size, a scalar tensor.
        """


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Steepest descent, as `torch.optim.SGD`: v ← μ v + (1 − dampening) (g + decay·θ), θ ← θ − rate·v."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    """μ; the first v is the first gradient."""
    dampening: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Taken off the gradient from the second step on."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """L2 penalty."""
    nesterov: bool = False
    """Step along g + μ v instead of v."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise InvalidSetting("SGD.nesterov", True, "it takes momentum above 0 and no dampening")

    def start(self, parameters: Tensor) -> Moments:
        return (torch.zeros_like(parameters),) if self.momentum else ()

    def step(
        self, parameters: Tensor, gradient: Tensor, moments: Moments, rate: Tensor, number: int
    ) -> tuple[Tensor, Moments]:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameters
        if not self.momentum:
            return parameters - rate * gradient, ()
        velocity = gradient if number == 0 else self.momentum * moments[0] + (1 - self.dampening) * gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return parameters - rate * direction, (velocity,)


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam (Kingma & Ba, arXiv 1412.6980) as `torch.optim.Adam`, or with ``decoupled`` decay as AdamW.

    Where the second moment is exactly 0 its square root has no derivative; there it counts as constant.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of both moments."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment, after its bias was taken off."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """L2 penalty, or the decoupled decay."""
    decoupled: bool = False
    """Shrink the parameters by rate·decay instead of adding the penalty to the gradient (AdamW)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidSetting("Adam.betas", self.betas, "two numbers of at least 0 and below 1")

    def start(self, parameters: Tensor) -> Moments:
        return torch.zeros_like(parameters), torch.zeros_like(parameters)

    def step(
        self, parameters: Tensor, gradient: Tensor, moments: Moments, rate: Tensor, number: int
    ) -> tuple[Tensor, Moments]:
        if self.weight_decay and self.decoupled:
            parameters = parameters * (1 - rate * self.weight_decay)
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * parameters
        first_decay, second_decay = self.betas
        first = first_decay * moments[0] + (1 - first_decay) * gradient
        second = second_decay * moments[1] + (1 - second_decay) * gradient.square()
        unbiased = second / (1 - second_decay ** (number + 1))
        moved = unbiased > 0
        root = torch.where(moved, torch.where(moved, unbiased, 1.0).sqrt(), 0.0)
        return parameters - rate / (1 - first_decay ** (number + 1)) * first / (root + self.eps), (first, second)
