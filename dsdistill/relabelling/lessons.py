"""Mini-batches with what teachers say of them, for `dsdistill.training.TrainingSet`: replayed, or drawn and asked."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsdistill.core.rng import Rng
from dsdistill.relabelling.distances import class_distances, lesson_targets
from dsdistill.relabelling.record import EpochRecord, blended, mixed, require_recordable, viewed
from dsdistill.training import Lesson, TrainingRecipe, TrainingSet

Lessons = Callable[[int], Iterator[Lesson]]
"""The mini-batches of an epoch."""


def replayed(
    images: Tensor,
    targets: Tensor,
    record: EpochRecord,
    labels: Callable[[slice], Tensor],
    kept: Tensor | None,
    num_classes: int,
) -> Iterator[Lesson]:
    """The mini-batches of a recorded epoch.

    Args:
        images: (N, C, H, W), all of the set.
        targets: (N,) classes or (N, K) probabilities, on their device.
        record: what is shown.
        labels: the teachers' labels of the views at some positions of the record, on that device.
        kept: (N,) bool by position; views that are not kept are left out of their mini-batch. None: all are.
        num_classes: K.
    """
    begin = 0
    for number, show in enumerate(record.batches()):
        span = slice(begin, begin + len(show.rows))
        begin = span.stop
        lesson = Lesson(record.shown(images, number), labels(span), record.labels(number, targets, num_classes))
        if kept is None:
            yield lesson
        elif bool(kept[span].any()):
            rows = kept[span].nonzero()[:, 0].to(images.device)
            classes = None if lesson.classes is None else lesson.classes[rows]
            yield Lesson(lesson.images[rows], lesson.targets[rows], classes)


def interpolated(data: TrainingSet, logits: Tensor, recipe: TrainingRecipe, rng: Rng, num_classes: int) -> Lessons:
    """Epochs drawn anew, labelled by the logits (N, K) of the clean images, which are mixed as the pixels are (UFC).

    Logits are, not probabilities: the softmax comes after. ``data`` has one image an item; logits are on its device.

    Raises:
        InvalidSetting: the recipe's views cannot be recorded.
    """

    def label(record: EpochRecord, number: int, _: Tensor) -> Tensor:
        return record.labels(number, logits, num_classes)

    return _drawn(data, recipe, rng, num_classes, label)


def measured(
    images: Tensor,
    targets: Tensor,
    teacher: Callable[[Tensor], Tensor],
    recipe: TrainingRecipe,
    rng: Rng,
    num_classes: int,
) -> Lessons:
    """Epochs drawn anew, of which a teacher is asked for the distances to the two classes of each view.

    Args:
        images: (N, C, H, W).
        targets: (N,) classes, on their device.
        teacher: logits (B, K) of a mini-batch as the network sees it.
        recipe: whose views, mixes and mini-batches are drawn.
        rng: from which streams.
        num_classes: K.

    Raises:
        InvalidSetting: the recipe's views cannot be recorded.
    """

    @torch.no_grad()
    def label(record: EpochRecord, number: int, shown: Tensor) -> Tensor:
        own, partner = record.pairs(number, targets)
        return lesson_targets(class_distances(teacher(shown), own, partner), own, partner)

    return _drawn(TrainingSet.of(images, targets), recipe, rng, num_classes, label)


def _drawn(
    data: TrainingSet,
    recipe: TrainingRecipe,
    rng: Rng,
    num_classes: int,
    label: Callable[[EpochRecord, int, Tensor], Tensor],
) -> Lessons:
    require_recordable(recipe)

    def lessons(epoch: int) -> Iterator[Lesson]:
        record = EpochRecord.draw(recipe, data.size, data.shape, rng, epoch)
        for number, show in enumerate(record.batches()):
            images, targets = data.fetch(show.rows.to(data.device, non_blocking=True))
            shown = mixed(viewed(images, show.views, recipe), show.mix, recipe)
            yield Lesson(shown, label(record, number, shown), blended(targets, show.mix, recipe, num_classes))

    return lessons
