"""Proving networks fresh, and testing them."""

import torch
from torch import Tensor, nn

from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.errors import DistillError
from dsdistill.networks import parameter_digest
from dsdistill.protocols import EvaluationProtocol


def fresh_network(protocol: EvaluationProtocol, shape: tuple[int, int, int], num_classes: int, rng: Rng) -> nn.Module:
    """A network proven fresh: built again from its seed it is the same to the last bit, from another seed it differs.

    This catches networks that were trained, shared or loaded; not a factory that trains anew at every call.

    Args:
        rng: scoped to the repeat; the seed is its stream "network".

    Raises:
        DistillError: a factory handed out a trained, shared or pretrained network.
    """
    spec, device = protocol.network, rng.device

    def build(stream: str) -> nn.Module:
        return spec.build(shape, num_classes, generator=rng.at(stream), device=device)

    network = build("network")
    digest = parameter_digest(network)
    other = build("other network")
    shared = [
        name
        for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True)
        if torch.equal(mine, theirs) and bool((mine != mine.flatten()[0]).any())  # constants (biases, norms) may agree
    ]
    if parameter_digest(build("network")) != digest or parameter_digest(other) == digest or shared:
        raise DistillError(
            f"network {spec.name!r} is not fresh: its initial parameters do not follow from the seed alone. "
            "Its factory must build a new, randomly initialised module at each call"
        )
    return network


@torch.no_grad()
def confusion(network: nn.Module, images: ImageSource, *, chunk: int) -> Tensor:
    """(K, K) int64 on the CPU: how many images of each class (row) the network takes for which (column).

    In evaluation mode, to which the network is set for the time being; one read of the device.
    """
    training, classes = network.training, images.num_classes
    network.eval()
    table = torch.zeros(classes * classes, dtype=torch.int64, device=images.device)
    for batch, targets in images.batches(chunk):
        table += torch.bincount(targets * classes + network(batch).argmax(1), minlength=classes * classes)
    network.train(training)
    return table.cpu().view(classes, classes)


def accuracy(table: Tensor) -> float:
    """Share of rightly classified images of a (K, K) confusion table."""
    return int(table.diagonal().sum()) / int(table.sum())
