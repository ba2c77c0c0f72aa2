"""Training networks, with the data on the device and no wait for it inside the loop.

One network is trained by `train`; several of one make by `train_together`, as one batched computation.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from dsdistill.core.device import default_chunk, in_parts
from dsdistill.core.rng import Rng
from dsdistill.errors import InvalidSetting
from dsdistill.networks import has_batchnorm
from dsdistill.training.recipe import TrainingRecipe


class TrainingSet(NamedTuple):
    """What a network is trained on.

    ``fetch(rows)`` gives the images (M, C, H, W), float32, standardised, and the targets, (M,) classes or (M, K)
    probabilities, of the items at int64 rows (R,); all on ``device``. An item is one image, or several (tiles,
    mirrored pairs). ``size`` is how many items there are, ``shape`` is (C, H, W).
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


def train(
    network: nn.Module,
    data: TrainingSet,
    recipe: TrainingRecipe,
    rng: Rng,
    *,
    num_classes: int,
    mirror_safe: bool,
    chunk: int | None = None,
    watch: Watch | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    limit: int | None = None,
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
        optimizer: of the network's parameters, to go on with; None makes a new one.
        limit: stop after so many steps, to learn what they cost.
    """
    optimizer = make_optimizer(list(network.parameters()), recipe, data.device) if optimizer is None else optimizer
    whole, chunk = has_batchnorm(network), chunk or default_chunk(data.shape, data.device)
    network.train()
    for batch in islice(_batches(data, recipe, rng, num_classes, mirror_safe), limit):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(batch.epoch)
        optimizer.zero_grad()
        size = len(batch.images) if whole else chunk
        for images, wanted in zip(in_parts(batch.images, size), in_parts(batch.targets, size), strict=True):
            loss = cross_entropy(network(images), wanted, reduction="sum") / len(batch.images)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if batch.last and watch is not None:
            watch(batch.epoch + 1, network)


def train_together(
    networks: Sequence[nn.Module],
    data: Sequence[TrainingSet],
    recipe: TrainingRecipe,
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

    optimizer = make_optimizer(list(parameters.values()), recipe, data[0].device)
    streams = [_batches(*pair, num_classes, mirror_safe) for pair in zip(data, [recipe] * len(data), rngs, strict=True)]
    for batches in zip(*streams, strict=True):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(batches[0].epoch)
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


def make_optimizer(parameters: list[Tensor], recipe: TrainingRecipe, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that ``recipe`` names, for ``parameters`` on ``device``."""
    fused = device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
    )


def _batches(
    data: TrainingSet, recipe: TrainingRecipe, rng: Rng, num_classes: int, mirror_safe: bool
) -> Iterator[_Batch]:
    """The mini-batches of all epochs: shuffled, shown under views, mixed."""
    augmentation = recipe.augmentation.suited(mirror_safe) if recipe.augmentation else None
    order, views, mixes = (rng.at(name, device="cpu") for name in ("order", "views", "mix"))
    for epoch in range(recipe.epochs):
        shuffled = torch.randperm(data.size, generator=order).to(data.device, non_blocking=True)
        parts = torch.split(shuffled, recipe.batch_size)
        for number, rows in enumerate(parts):
            images, targets = data.fetch(rows)
            if augmentation is not None:
                record = augmentation.sample(len(images), data.shape, views, per="image", device=data.device)
                images = augmentation.apply(images, record)
            if recipe.mix is not None:
                mix = recipe.mix.sample(len(images), data.shape, mixes, device=data.device)
                if mix.share < 1:
                    images, targets = recipe.mix.apply(images, mix), recipe.mix.targets(targets, mix, num_classes)
            yield _Batch(epoch, number == len(parts) - 1, images, targets)
