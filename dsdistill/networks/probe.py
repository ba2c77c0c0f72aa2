"""Running a network once to learn something about it, without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dsdistill.errors import InvalidSetting


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules of a network, so that no statistics move; then each has its own mode again."""
    with _modes_kept(network):
        network.eval()
        yield


@contextmanager
def student_mode(network: nn.Module) -> Iterator[None]:
    """Training mode for all modules of a network but those of dropout; then each has its own mode again."""
    with _modes_kept(network):
        network.train()
        for part in network.modules():
            if isinstance(part, _DropoutNd):
                part.eval()
        yield


@contextmanager
def _modes_kept(network: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in network.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def unsuitable(name: str, problem: str) -> InvalidSetting:
    """The error for a network that a factory or a library made and that does not do."""
    return InvalidSetting("network factory", name, problem)


@torch.no_grad()
def check_output(
    name: str, network: nn.Module, shape: tuple[int, int, int], num_classes: int, device: torch.device
) -> None:
    """Run two blank images ``(2, C, H, W)`` through a network that is called ``name``.

    Raises:
        InvalidSetting: it fails, or returns anything but logits ``(2, num_classes)``.
    """
    try:
        with evaluation_mode(network):
            output = network(torch.zeros(2, *shape, device=device))
    except Exception as error:
        raise unsuitable(name, f"its network fails on images of shape {(2, *shape)}: {error}") from error
    if not isinstance(output, torch.Tensor) or output.shape != (2, num_classes):
        actual = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise unsuitable(
            name, f"for images of shape {(2, *shape)} it must return logits {(2, num_classes)}, not {actual}"
        )
