from itertools import chain

import pytest
import torch

from dsdistill.augmentations import CutMix, Mixup, PadCrop, Siamese
from dsdistill.core.rng import Rng
from dsdistill.training import Lesson, TrainingRecipe, TrainingSet, sub_batches
from dsdistill.training.batches import epochs_of

RNG = Rng(3, job="repeat/0")


def examples(count=11, shape=(3, 4, 6)):
    generator = torch.Generator().manual_seed(0)
    return TrainingSet.of(
        torch.randn(count, *shape, generator=generator), torch.randint(3, (count,), generator=generator)
    )


def drawn(data, recipe, **options):
    epochs = epochs_of(data, recipe, RNG, num_classes=3, mirror_safe=True, **options)
    return [list(epoch) for epoch in epochs]


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b
        for lesson, twin in zip(one, other, strict=True)
        for a, b in zip(lesson, twin, strict=True)
    )


@pytest.mark.parametrize(
    ("rows", "parts", "sizes"),
    [(16, 2, [8, 8]), (11, 2, [6, 5]), (1, 2, [1]), (7, 3, [3, 2, 2]), (4, 1, [4]), (2, 5, [1, 1])],
)
def test_sub_batches_are_in_order_and_nearly_equal(rows, parts, sizes):
    batch = torch.arange(rows)
    made = sub_batches(batch, parts)
    assert [len(part) for part in made] == sizes
    assert torch.equal(torch.cat(made), batch)


def test_every_epoch_shows_every_image_once():
    data = examples()
    for epoch in drawn(data, TrainingRecipe(epochs=3, batch_size=4)):
        assert [len(lesson.images) for lesson in epoch] == [4, 4, 3]
        assert all(lesson.classes is None for lesson in epoch)
        images, targets = torch.cat([one.images for one in epoch]), torch.cat([one.targets for one in epoch])
        places = [(data.fetch(torch.arange(11))[0] == image).all((1, 2, 3)).nonzero().item() for image in images]
        assert sorted(places) == list(range(11))
        assert torch.equal(targets, data.fetch(torch.tensor(places))[1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"augmentation": PadCrop(pad=1)}, {"augmentation": Siamese(), "mix": CutMix(probability=0.5)}],
    ids=["plain", "views", "views and mix"],
)
def test_epochs_that_are_left_out_change_nothing(settings):
    recipe = TrainingRecipe(epochs=5, batch_size=4, **settings)
    data = examples()
    whole = drawn(data, recipe)
    for begin in (1, 3, 5):
        rest = drawn(data, recipe, begin=begin)
        assert len(rest) == 5 - begin
        assert all(same(one, other) for one, other in zip(whole[begin:], rest, strict=True))
    assert not same(whole[0], whole[1])


def test_items_of_several_images_are_left_out_alike():
    single = examples()
    data = single._replace(fetch=lambda rows: tuple(torch.cat([one, one]) for one in single.fetch(rows)))
    recipe = TrainingRecipe(epochs=3, batch_size=4, augmentation=PadCrop(pad=1))
    assert same(drawn(data, recipe)[2], drawn(data, recipe, begin=2)[0])


def test_a_teacher_is_asked_about_what_the_network_sees():
    asked = []

    def teacher(images):
        asked.append(images)
        assert not torch.is_grad_enabled()
        return images.flatten(1)[:, :3].double()

    recipe = TrainingRecipe(epochs=2, batch_size=4, augmentation=PadCrop(pad=1), mix=Mixup())
    data = examples()
    plain, taught = drawn(data, recipe), drawn(data, recipe, teacher=teacher)
    assert len(asked) == 6
    for one, other, seen in zip(chain(*plain), chain(*taught), asked, strict=True):
        assert torch.equal(one.images, other.images)
        assert other.images is seen
        assert other.targets.dtype == torch.float32
        assert torch.equal(other.targets, one.images.flatten(1)[:, :3])
        assert torch.equal(other.classes, one.targets)  # mixed as the images are
        assert other.classes.shape == (len(one.images), 3)


def test_lessons_come_as_they_are():
    made = {}

    def lessons(epoch):
        made[epoch] = [Lesson(torch.ones(2, 3, 4, 6) * epoch, torch.zeros(2, 3)) for _ in range(2)]
        return iter(made[epoch])

    data = examples()._replace(lessons=lessons)
    recipe = TrainingRecipe(epochs=3, augmentation=PadCrop(), mix=CutMix())
    seen = drawn(data, recipe, teacher=lambda images: pytest.fail("nobody is to be asked"))
    assert [[id(lesson) for lesson in epoch] for epoch in seen] == [[id(one) for one in made[e]] for e in range(3)]
    assert len(drawn(data, recipe, begin=2)) == 1
