"""Training networks, with the data on the device and no wait for it inside the loop.

One network is trained by `train`; several of one make by `train_together`, as one batched computation.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from dsdistill.core.device import default_chunk, in_parts
from dsdistill.core.rng import Rng
from dsdistill.errors import InvalidSetting
from dsdistill.networks import has_batchnorm
from dsdistill.training.batches import Lesson, Teacher, TrainingSet, epochs_of, sub_batches
from dsdistill.training.optimizer import make_optimizer, set_rate
from dsdistill.training.recipe import TrainingRecipe

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
    teacher: Teacher | None = None,
    begin: int = 0,
) -> None:
    """Train ``network`` in place.

    A batch passes in chunks whose gradients add up to the batch's, which keeps activations in the caches; a network
    with batch normalisation, which couples the images of a batch, gets it whole, or in the sub-batches of the recipe.

    With distillation the targets are the logits of lessons that the set brings along, or else those of ``teacher``.

    Args:
        data: images and targets, or lessons.
        rng: scoped to the repeat; uses the streams "order", "views" and "mix".
        num_classes: K.
        mirror_safe: whether a flip keeps the class.
        chunk: images that pass at once; None for a size that suits device and image.
        watch: called after each epoch, with the number of those behind the network.
        optimizer: of the network's parameters, to go on with; None makes a new one.
        limit: stop after so many steps, to learn what they cost; ``watch`` is not called for the epoch they end in.
        teacher: logits (B, K) of a batch (B, C, H, W) as the network sees it, asked without gradients; only with
            distillation, and not asked where the set has lessons.
        begin: epochs that the network and ``optimizer`` have behind them; the others go on as if it were one training.

    Raises:
        InvalidSetting: distillation without lessons or teacher, or one of these without distillation.
    """
    _check(recipe, data, teacher)
    if optimizer is None:
        optimizer = make_optimizer(dict(network.named_parameters()), recipe, data.device)
    whole, chunk = has_batchnorm(network), chunk or default_chunk(data.shape, data.device)
    network.train()
    epochs = epochs_of(
        data, recipe, rng, num_classes=num_classes, mirror_safe=mirror_safe, teacher=teacher, begin=begin
    )
    for epoch, lessons in enumerate(epochs, begin):
        for lesson in islice(lessons, limit):
            set_rate(optimizer, recipe.learning_rate(epoch))
            optimizer.zero_grad()
            for part in _parts(lesson, recipe.sub_batches, None if whole else chunk):
                loss = _loss(recipe, network(part.images), part) / len(lesson.images)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            limit = None if limit is None else limit - 1
        if limit == 0:
            return
        if watch is not None:
            watch(epoch + 1, network)


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
            random numbers (dropout), or the sets differ in size, or what is learned are a teacher's logits.
    """
    base = networks[0]
    if has_batchnorm(base):
        raise InvalidSetting("together", len(networks), "networks with batch normalisation are trained one by one")
    if len({one.size for one in data}) > 1:
        raise InvalidSetting("together", [one.size for one in data], "sets of one size")
    if recipe.distillation is not None or any(one.lessons is not None for one in data):
        raise InvalidSetting("together", len(networks), "networks that learn from a teacher are trained one by one")
    base.train()
    parameters, buffers = stack_module_state(list(networks))

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(base, (parameters, buffers), (images,))
        return logits

    optimizer = make_optimizer(parameters, recipe, data[0].device, stacked=True)
    streams = [
        epochs_of(one, recipe, rng, num_classes=num_classes, mirror_safe=mirror_safe)
        for one, rng in zip(data, rngs, strict=True)
    ]
    for epoch, parallel in enumerate(zip(*streams, strict=True)):
        for batches in zip(*parallel, strict=True):
            set_rate(optimizer, recipe.learning_rate(epoch))
            optimizer.zero_grad()
            images = torch.stack([batch.images for batch in batches])
            logits = _stacked(forward, parameters, buffers, images)
            # Each network's own mean over its batch; the sum of the losses has each network's own gradient.
            summed = cross_entropy(logits.flatten(0, 1), _targets(batches, num_classes), reduction="sum")
            (summed / images.shape[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        for position, network in enumerate(networks):
            for name, parameter in network.named_parameters():
                parameter.copy_(parameters[name][position])


def _check(recipe: TrainingRecipe, data: TrainingSet, teacher: Teacher | None) -> None:
    taught = [name for name, given in (("lessons", data.lessons), ("teacher", teacher)) if given is not None]
    if recipe.distillation is None and taught:
        raise InvalidSetting("distillation", None, f"a Distillation, as there is what it needs: {', '.join(taught)}")
    if recipe.distillation is not None and not taught:
        raise InvalidSetting("distillation", recipe.distillation, "lessons of the set, or a teacher to ask for logits")


def _parts(lesson: Lesson, count: int, chunk: int | None) -> Iterator[Lesson]:
    """What passes the network at once: the sub-batches, each in chunks unless ``chunk`` is None."""

    def split(tensor: Tensor) -> list[Tensor]:
        parts = sub_batches(tensor, count)
        return [piece for part in parts for piece in (in_parts(part, chunk) if chunk else (part,))]

    images, targets = split(lesson.images), split(lesson.targets)
    classes: Sequence[Tensor] | repeat[None]
    classes = repeat(None, len(images)) if lesson.classes is None else split(lesson.classes)
    return map(Lesson, images, targets, classes)


def _loss(recipe: TrainingRecipe, logits: Tensor, part: Lesson) -> Tensor:
    """Sum over the images."""
    if recipe.distillation is not None:
        return recipe.distillation.loss(logits, part.targets, part.classes)
    return cross_entropy(logits, part.targets, reduction="sum")


def _stacked(forward: Callable[..., Tensor], parameters: Any, buffers: Any, images: Tensor) -> Tensor:
    try:
        logits: Tensor = vmap(forward)(parameters, buffers, images)
    except RuntimeError as error:
        if "random operation" not in str(error):
            raise
        allowed = "networks that draw random numbers when they run (dropout) are trained one by one"
        raise InvalidSetting("together", len(images), allowed) from error
    return logits


def _targets(batches: Sequence[Lesson], num_classes: int) -> Tensor:
    """Targets of several mini-batches one after the other; classes become probabilities where only some were mixed."""
    if len({batch.targets.dim() for batch in batches}) == 1:
        return torch.cat([batch.targets for batch in batches])
    return torch.cat(
        [
            batch.targets if batch.targets.dim() == 2 else nn.functional.one_hot(batch.targets, num_classes).float()
            for batch in batches
        ]
    )
