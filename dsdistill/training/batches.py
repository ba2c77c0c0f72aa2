"""The mini-batches of a training: drawn from a set, or ready made."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsdistill.augmentations import MixViews, Views
from dsdistill.core.rng import Rng
from dsdistill.training.recipe import TrainingRecipe


class Lesson(NamedTuple):
    """A mini-batch as the network sees it, and what it is to learn of it; rows are images in all of it."""

    images: Tensor
    """(B, C, H, W), shown under their views and mixed."""
    targets: Tensor
    """(B,) classes or (B, K) probabilities; with distillation, the teacher's logits (B, K), float32."""
    classes: Tensor | None = None
    """With distillation: (B,) classes or (B, K) probabilities, mixed as the images are; None if there are none."""


class TrainingSet(NamedTuple):
    """What a network is trained on.

    ``fetch(rows)`` gives the images (M, C, H, W), float32, standardised, and the targets, (M,) classes or (M, K)
    probabilities, of the items at int64 rows (R,); all on ``device``. An item is one image, or several (tiles,
    mirrored pairs). ``size`` is how many items there are, ``shape`` is (C, H, W).

    If there are ``lessons``, the mini-batches of epoch e are those of ``lessons(e)``, on ``device``, as they are:
    nothing is drawn or fetched. Only a recipe with distillation takes them.
    """

    fetch: Callable[[Tensor], tuple[Tensor, Tensor]]
    size: int
    shape: tuple[int, int, int]
    device: torch.device
    lessons: Callable[[int], Iterator[Lesson]] | None = None

    @classmethod
    def of(
        cls, images: Tensor, targets: Tensor, lessons: Callable[[int], Iterator[Lesson]] | None = None
    ) -> "TrainingSet":
        """Images (M, C, H, W) and targets held in memory."""
        _, channels, height, width = images.shape
        shape = (channels, height, width)
        return cls(lambda rows: (images[rows], targets[rows]), len(images), shape, images.device, lessons)


Teacher = Callable[[Tensor], Tensor]
"""Gives the logits (B, K) of images (B, C, H, W)."""


def epochs_of(
    data: TrainingSet,
    recipe: TrainingRecipe,
    rng: Rng,
    *,
    num_classes: int,
    mirror_safe: bool,
    teacher: Teacher | None = None,
    begin: int = 0,
) -> Iterator[Iterator[Lesson]]:
    """The mini-batches of each epoch from ``begin`` on: shuffled, shown under views, mixed; or the lessons of the set.

    Take an epoch to its end before the next: all draw from the same streams, "order", "views" and "mix" of ``rng``.
    What the epochs before ``begin`` draw is drawn too, so that those that follow are the same.
    """
    if data.lessons is not None:
        yield from map(data.lessons, range(begin, recipe.epochs))
        return
    drawing = _Drawing(data, recipe, rng, num_classes, mirror_safe)
    for epoch in range(recipe.epochs):
        if epoch < begin:
            drawing.skip()
        else:
            yield drawing.epoch() if teacher is None else _asked(drawing.epoch(), teacher)


def sub_batches(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The rows of a batch in ``parts`` parts, in order, of nearly equal size, the larger ones first.

    Students and teachers that take batch statistics of parts split a batch in this one way. Fewer parts than asked for
    if the batch has fewer rows.
    """
    return torch.tensor_split(tensor, max(1, min(parts, len(tensor))))


class _Drawing:
    """Draws the mini-batches of one epoch after the other."""

    def __init__(
        self, data: TrainingSet, recipe: TrainingRecipe, rng: Rng, num_classes: int, mirror_safe: bool
    ) -> None:
        self.data, self.recipe, self.num_classes = data, recipe, num_classes
        self.augmentation = recipe.augmentation.suited(mirror_safe) if recipe.augmentation else None
        self.order, self.views, self.mixes = (rng.at(name, device="cpu") for name in ("order", "views", "mix"))

    def epoch(self) -> Iterator[Lesson]:
        for rows in self._rows():
            images, targets = self.data.fetch(rows)
            record, mix = self._records(len(images))
            if self.augmentation is not None and record is not None:
                images = self.augmentation.apply(images, record)
            if self.recipe.mix is not None and mix is not None and mix.share < 1:
                images = self.recipe.mix.apply(images, mix)
                targets = self.recipe.mix.targets(targets, mix, self.num_classes)
            yield Lesson(images, targets)

    def skip(self) -> None:
        """Draw what an epoch draws, and show nothing."""
        for rows in self._rows():
            if self.augmentation is not None or self.recipe.mix is not None:
                self._records(len(self.data.fetch(rows)[0]))  # how many images an item has, only the set knows

    def _rows(self) -> tuple[Tensor, ...]:
        data = self.data
        shuffled = torch.randperm(data.size, generator=self.order).to(data.device, non_blocking=True)
        return torch.split(shuffled, self.recipe.batch_size)

    def _records(self, count: int) -> tuple[Views | None, MixViews | None]:
        shape, device, views = self.data.shape, self.data.device, None
        if self.augmentation is not None:
            views = self.augmentation.sample(count, shape, self.views, per="image", device=device)
        mix = self.recipe.mix.sample(count, shape, self.mixes, device=device) if self.recipe.mix is not None else None
        return views, mix


def _asked(batches: Iterator[Lesson], teacher: Teacher) -> Iterator[Lesson]:
    """The same batches with the logits of a teacher in place of the classes."""
    for images, classes, _ in batches:
        with torch.no_grad():
            logits = teacher(images).float()
        yield Lesson(images, logits, classes)
