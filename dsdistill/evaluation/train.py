"""Training and testing networks, with the data on the device and no wait for it inside the loop.

One network is trained by `train`; several of one make by `train_together`, as one batched computation.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from dsdistill.core.device import default_chunk
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.errors import DistillError, InvalidSetting
from dsdistill.evaluation.protocol import EvaluationProtocol
from dsdistill.networks import has_batchnorm, parameter_digest


class TrainingSet(NamedTuple):
    """What a network is trained on.

    ``fetch(rows)`` gives the images (R, C, H, W), float32, standardised, and the targets, (R,) classes or (R, K)
    probabilities, at int64 rows (R,); all on ``device``. ``size`` is how many there are, ``shape`` is (C, H, W).
    """

    fetch: Callable[[Tensor], tuple[Tensor, Tensor]]
    size: int
    shape: tuple[int, int, int]
    device: torch.device

    @classmethod
    def of(cls, images: Tensor, targets: Tensor) -> "TrainingSet":
        """Images (M, C, H, W) and targets held in memory."""
        _, channels, height, width = images.shape
        return cls(lambda rows: (images[rows], targets[rows]), len(images), (channels, height, width), images.device)


class _Batch(NamedTuple):
    """A mini-batch as the network sees it, in which epoch, and whether that epoch ends with it."""

    epoch: int
    last: bool
    images: Tensor
    targets: Tensor


Watch = Callable[[int, nn.Module], None]
"""Called with the number of finished epochs and the network, in training mode; must leave it as it was."""


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


def train(
    network: nn.Module,
    data: TrainingSet,
    protocol: EvaluationProtocol,
    rng: Rng,
    *,
    num_classes: int,
    mirror_safe: bool,
    chunk: int | None = None,
    watch: Watch | None = None,
) -> None:
    """Train ``network`` in place.

    A batch passes in chunks whose gradients add up to the batch's, which keeps activations in the caches; a network
    with batch normalisation, which couples the images of a batch, gets it whole.

    Args:
        data: images and targets.
        rng: scoped to the repeat; uses the streams "order", "views" and "mix".
        num_classes: K.
        mirror_safe: whether a flip keeps the class.
        chunk: images that pass at once; None for a size that suits device and image.
        watch: called after each epoch.
    """
    optimizer = _optimizer(list(network.parameters()), protocol, data.device)
    chunk = protocol.batch_size if has_batchnorm(network) else chunk or default_chunk(data.shape, data.device)
    network.train()
    for batch in _batches(data, protocol, rng, num_classes, mirror_safe):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate(batch.epoch)
        optimizer.zero_grad()
        for images, wanted in zip(torch.split(batch.images, chunk), torch.split(batch.targets, chunk), strict=True):
            loss = cross_entropy(network(images), wanted, reduction="sum") / len(batch.images)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if batch.last and watch is not None:
            watch(batch.epoch + 1, network)


def train_together(
    networks: Sequence[nn.Module],
    data: Sequence[TrainingSet],
    protocol: EvaluationProtocol,
    rngs: Sequence[Rng],
    *,
    num_classes: int,
    mirror_safe: bool,
) -> None:
    """Train several networks of one make in place, each on its own data and streams, as one stacked computation.

    What each predicts equals `train` on each but for rounding. Worth it where one network leaves the device idle.

    Raises:
        InvalidSetting: the networks have batch normalisation, whose running statistics cannot be stacked, or draw
            random numbers (dropout), or the sets differ in size.
    """
    base = networks[0]
    if has_batchnorm(base):
        raise InvalidSetting("together", len(networks), "networks with batch normalisation are trained one by one")
    if len({one.size for one in data}) > 1:
        raise InvalidSetting("together", [one.size for one in data], "sets of one size")
    base.train()
    parameters, buffers = stack_module_state(list(networks))

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(base, (parameters, buffers), (images,))
        return logits

    optimizer = _optimizer(list(parameters.values()), protocol, data[0].device)
    streams = [
        _batches(*pair, num_classes, mirror_safe) for pair in zip(data, [protocol] * len(data), rngs, strict=True)
    ]
    for batches in zip(*streams, strict=True):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate(batches[0].epoch)
        optimizer.zero_grad()
        images = torch.stack([batch.images for batch in batches])
        logits = _stacked(forward, parameters, buffers, images)
        # Each network's own mean over its batch; the sum of the losses has each network's own gradient.
        loss = cross_entropy(logits.flatten(0, 1), _targets(batches, num_classes), reduction="sum") / images.shape[1]
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        for position, network in enumerate(networks):
            for name, parameter in network.named_parameters():
                parameter.copy_(parameters[name][position])


def _stacked(forward: Callable[..., Tensor], parameters: Any, buffers: Any, images: Tensor) -> Tensor:
    try:
        logits: Tensor = vmap(forward)(parameters, buffers, images)
    except RuntimeError as error:
        if "random operation" not in str(error):
            raise
        allowed = "networks that draw random numbers when they run (dropout) are trained one by one"
        raise InvalidSetting("together", len(images), allowed) from error
    return logits


def _targets(batches: Sequence[_Batch], num_classes: int) -> Tensor:
    """Targets of several mini-batches one after the other; classes become probabilities where only some were mixed."""
    if len({batch.targets.dim() for batch in batches}) == 1:
        return torch.cat([batch.targets for batch in batches])
    return torch.cat(
        [
            batch.targets if batch.targets.dim() == 2 else nn.functional.one_hot(batch.targets, num_classes).float()
            for batch in batches
        ]
    )


def _optimizer(parameters: list[Tensor], protocol: EvaluationProtocol, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type in ("cpu", "cuda")
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=protocol.lr, weight_decay=protocol.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay, fused=fused
    )


def _batches(
    data: TrainingSet, protocol: EvaluationProtocol, rng: Rng, num_classes: int, mirror_safe: bool
) -> Iterator[_Batch]:
    """The mini-batches of all epochs: shuffled, shown under views, mixed."""
    augmentation = protocol.augmentation.suited(mirror_safe) if protocol.augmentation else None
    order, views, mixes = (rng.at(name, device="cpu") for name in ("order", "views", "mix"))
    for epoch in range(protocol.epochs):
        shuffled = torch.randperm(data.size, generator=order).to(data.device, non_blocking=True)
        parts = torch.split(shuffled, protocol.batch_size)
        for number, rows in enumerate(parts):
            images, targets = data.fetch(rows)
            if augmentation is not None:
                record = augmentation.sample(len(rows), data.shape, views, per="image", device=data.device)
                images = augmentation.apply(images, record)
            if protocol.mix is not None:
                mix = protocol.mix.sample(len(rows), data.shape, mixes, device=data.device)
                if mix.share < 1:
                    images, targets = protocol.mix.apply(images, mix), protocol.mix.targets(targets, mix, num_classes)
            yield _Batch(epoch, number == len(parts) - 1, images, targets)


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
