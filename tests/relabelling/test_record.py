"""What an epoch shows, and that it can be shown again."""

from dataclasses import replace

import pytest
import torch
from relabelling.makers import CUT

from dsdistill.augmentations import CutMix, Mixup, PadCrop, PatchShuffle, ResizedCrop, Siamese
from dsdistill.core.rng import Rng
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.relabelling.record import EpochRecord, layout, require_recordable
from dsdistill.training import TrainingRecipe

SHAPE = (3, 8, 6)
RECIPES = {
    "crops and cuts": CUT,
    "padded and blended": TrainingRecipe(batch_size=4, augmentation=PadCrop(pad=2), mix=Mixup(alpha=0.8)),
    "only crops": TrainingRecipe(batch_size=5, augmentation=ResizedCrop(shift=2)),
    "only cuts": TrainingRecipe(batch_size=3, mix=CutMix(probability=1.0)),
    "as they are": TrainingRecipe(batch_size=4),
    "one batch": replace(CUT, batch_size=100),
    "single images": replace(CUT, batch_size=1),
}


def images(count=10):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def drawn(recipe, epoch=0, count=10, seed=0):
    return EpochRecord.draw(recipe, count, SHAPE, Rng(seed), epoch)


@pytest.fixture(params=RECIPES.values(), ids=RECIPES.keys())
def recipe(request):
    return request.param


def test_a_record_survives_as_integers(recipe):
    record = drawn(recipe)
    stored = record.tensors()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == layout(recipe, 10, SHAPE)
    again = EpochRecord.of_tensors(stored, recipe, 10, SHAPE)
    given = images()
    for number in range(len(record)):
        assert torch.equal(again.shown(given, number), record.shown(given, number))
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in stored.items())


def test_every_image_is_shown_once_in_batches_with_a_ragged_last_one(recipe):
    rows = [show.rows for show in drawn(recipe).batches()]
    assert torch.cat(rows).sort().values.tolist() == list(range(10))
    size = min(recipe.batch_size, 10)
    assert [len(part) for part in rows] == [size] * (10 // size) + ([10 % size] if 10 % size else [])


def test_one_image_alone_has_the_bits_that_it_has_in_its_batch(recipe):
    record, given = drawn(recipe), images()
    whole = torch.cat([record.shown(given, number) for number in range(len(record))])
    assert torch.equal(record.shown_together(given, range(len(record))), whole)
    for position in range(10):
        assert torch.equal(record.shown_one(given, position), whole[position])


def test_views_are_those_of_the_augmentation_and_mixes_those_of_the_mix():
    record, given = drawn(CUT, epoch=2), images()
    rng = Rng(0)
    order = torch.randperm(10, generator=rng.at("order", 2))
    views = CUT.augmentation.sample(10, SHAPE, rng.at("views", 2), per="image")
    generator = rng.at("mix", 2)
    for number, rows in enumerate(order.split(4)):
        mix = CUT.mix.sample(len(rows), SHAPE, generator)
        at = torch.arange(4 * number, 4 * number + len(rows))
        seen = CUT.augmentation.apply(given[rows], views.rows(at))
        assert torch.equal(record.shown(given, number), CUT.mix.apply(seen, mix))
        classes = rows % 3
        expected = classes if mix.share == 1 else CUT.mix.targets(classes, mix, 3)
        assert torch.equal(record.labels(number, torch.arange(10) % 3, 3), expected)
        own, partner = record.pairs(number, torch.arange(10))
        assert torch.equal(own, rows)
        assert torch.equal(partner, rows[mix.partner])


def test_logits_are_mixed_before_any_softmax():
    recipe = TrainingRecipe(batch_size=2, mix=Mixup())
    record = drawn(recipe, count=2)
    logits = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    mix = record.batch(0).mix
    own = logits[record.order]
    expected = own * mix.share + own[mix.partner] * (1 - mix.share)
    assert torch.equal(record.labels(0, logits, 2), expected)


def test_epochs_and_seeds_differ_and_do_not_depend_on_one_another():
    orders = [drawn(CUT, epoch).order.tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert drawn(CUT, 2).order.tolist() == orders[2]
    assert drawn(CUT, 2, seed=1).order.tolist() != orders[2]


@pytest.mark.parametrize("name", ["order", "partner", "share", "views"])
def test_a_record_of_something_else_is_refused(name):
    stored = drawn(CUT).tensors()
    wrong = {
        "order": torch.zeros(10, dtype=torch.int32),
        "partner": torch.zeros(10, dtype=torch.int16),
        "share": torch.ones(3),
        "views": stored["views"][:9],
    }
    with pytest.raises(BadData):
        EpochRecord.of_tensors({**stored, name: wrong[name]}, CUT, 10, SHAPE)


@pytest.mark.parametrize("augmentation", [Siamese(), PatchShuffle(then=ResizedCrop())])
def test_views_of_another_kind_cannot_be_recorded(augmentation):
    with pytest.raises(InvalidSetting, match="labels are kept for ResizedCrop and PadCrop"):
        require_recordable(replace(CUT, augmentation=augmentation))
