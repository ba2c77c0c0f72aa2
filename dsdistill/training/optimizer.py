"""Making the optimiser that a recipe names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsdistill.errors import InvalidSetting
from dsdistill.training.recipe import TrainingRecipe


def make_optimizer(
    parameters: Sequence[Tensor] | Mapping[str, Tensor],
    recipe: TrainingRecipe,
    device: torch.device,
    *,
    stacked: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser that ``recipe`` names, for ``parameters`` on ``device``.

    Args:
        parameters: of a network; by name, ``dict(network.named_parameters())``, where only weights are to decay.
        recipe: the settings.
        device: where the parameters are.
        stacked: each parameter is that of several networks along a first dimension of its own.

    Raises:
        InvalidSetting: only weights are to decay, but the parameters have no names.
    """
    groups = _groups(parameters, recipe, stacked)
    fused = device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make the next steps with the step size ``rate``, of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _groups(
    parameters: Sequence[Tensor] | Mapping[str, Tensor], recipe: TrainingRecipe, stacked: bool
) -> list[dict[str, Any]]:
    if not recipe.decay_only_weights:
        return [{"params": list(parameters.values() if isinstance(parameters, Mapping) else parameters)}]
    if not isinstance(parameters, Mapping):
        raise InvalidSetting("decay_only_weights", True, "parameters by name: dict(network.named_parameters())")
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in parameters.items():
        (decayed if "weight" in name and parameter.dim() - stacked > 1 else others).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
