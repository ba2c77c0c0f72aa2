"""Training and testing one network, with the data on the device and no wait for it inside the loop."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dsdistill.core.device import default_chunk
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.errors import DistillError
from dsdistill.evaluation.protocol import EvaluationProtocol
from dsdistill.networks import has_batchnorm, parameter_digest


class TrainingSet(NamedTuple):
    """What a network is trained on, on its device.

    ``fetch(rows)`` gives standardised images (len(rows), C, H, W), float32; ``targets`` is (M,) classes or (M, K)
    probabilities; ``shape`` is (C, H, W).
    """

    fetch: Callable[[Tensor], Tensor]
    targets: Tensor
    shape: tuple[int, int, int]


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


def train(network: nn.Module, data: TrainingSet, protocol: EvaluationProtocol, rng: Rng, *, mirror_safe: bool) -> None:
    """Train ``network`` in place.

    A batch passes in chunks whose gradients add up to the batch's, which keeps activations in the caches; a network
    with batch normalisation, which couples the images of a batch, gets it whole.

    Args:
        data: images and targets, on the device.
        rng: scoped to the repeat; uses the streams "order" and "views".
        mirror_safe: whether a flip keeps the class.
    """
    fetch, targets, shape = data
    device = targets.device
    augmentation = protocol.augmentation.suited(mirror_safe) if protocol.augmentation else None
    order, views = rng.at("order", device="cpu"), rng.at("views", device="cpu")
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    chunk = protocol.batch_size if has_batchnorm(network) else default_chunk(shape, device)
    network.train()
    for epoch in range(protocol.epochs):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate(epoch)
        shuffled = torch.randperm(len(targets), generator=order).to(device, non_blocking=True)
        for rows in torch.split(shuffled, protocol.batch_size):
            batch = fetch(rows)
            if augmentation is not None:
                record = augmentation.sample(len(rows), shape, views, per="image", device=device)
                batch = augmentation.apply(batch, record)
            optimizer.zero_grad()
            for images, wanted in zip(torch.split(batch, chunk), torch.split(targets[rows], chunk), strict=True):
                loss = cross_entropy(network(images), wanted, reduction="sum") / len(rows)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, test: ImageSource, *, chunk: int) -> float:
    """Share of ``test`` images that ``network`` classifies rightly, in evaluation mode; one read of the device."""
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=test.device)
    for images, targets in test.batches(chunk):
        correct += (network(images).argmax(1) == targets).sum()
    return int(correct) / len(test)
