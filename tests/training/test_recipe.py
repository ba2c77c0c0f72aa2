import json
import math

import pytest

from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import InvalidSetting
from dsdistill.training import Distillation, TrainingRecipe


@pytest.mark.parametrize(
    ("slowdown", "factors"), [(1.0, [1, 0.8536, 0.5, 0.1464, 0.0]), (2.0, [1, 0.9619, 0.8536, 0.6913, 0.5026])]
)
def test_the_cosine_is_the_published_table(slowdown, factors):
    recipe = TrainingRecipe(epochs=300, lr=0.001, schedule="cosine", slowdown=slowdown)
    rates = [recipe.learning_rate(epoch) / 0.001 for epoch in (0, 75, 150, 225, 299)]
    assert rates == pytest.approx(factors, abs=5e-5)
    every = [recipe.learning_rate(epoch) for epoch in range(300)]
    assert every == sorted(every, reverse=True)
    assert every[-1] > 0


def test_the_cosine_goes_over_what_the_warm_up_leaves():
    recipe = TrainingRecipe(epochs=25, lr=0.2, schedule="cosine", warmup=5)
    rates = [recipe.learning_rate(epoch) for epoch in range(25)]
    assert rates[:5] == pytest.approx([0.2 * (0.01 + 0.99 * epoch / 5) for epoch in range(5)])
    assert rates[5] == 0.2
    assert rates[15] == pytest.approx(0.1)
    assert rates[24] == pytest.approx(0.1 * (1 + math.cos(math.pi * 19 / 20)))


def test_steps_may_be_warmed_up_too_and_a_warm_up_outlast_the_training():
    recipe = TrainingRecipe(epochs=10, lr=1.0, warmup=2, warmup_start=0.5)
    assert [recipe.learning_rate(epoch) for epoch in range(10)] == pytest.approx([0.5, 0.75, 1, 1, 1, *[0.1] * 5])
    short = TrainingRecipe(epochs=2, lr=1.0, warmup=4, warmup_start=0.2, schedule="cosine")
    assert [short.learning_rate(epoch) for epoch in range(2)] == pytest.approx([0.2, 0.4])


def test_defaults_are_what_they_were():
    recipe = TrainingRecipe()
    assert (recipe.schedule, recipe.warmup, recipe.sub_batches, recipe.distillation) == ("steps", 0, 1, None)
    assert not recipe.decay_only_weights
    assert [recipe.learning_rate(epoch) for epoch in (0, 9, 10, 19)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    old = {key: value for key, value in to_dict(recipe).items() if key in ("type", "epochs", "lr", "milestones")}
    assert from_dict(TrainingRecipe, old) == recipe  # what was written before there was more


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "lion"},
        {"schedule": "linear"},
        {"slowdown": 0.0},
        {"warmup": -1},
        {"warmup_start": 0.0},
        {"warmup_start": 1.1},
        {"sub_batches": 0},
        {"decay_only_weights": 1},
        {"distillation": 20.0},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidSetting, match=rf"TrainingRecipe\.{next(iter(settings))}"):
        TrainingRecipe(**settings)


def test_settings_are_plain_on_disk_and_documented():
    recipe = TrainingRecipe(distillation=Distillation(squared=True), schedule="cosine", optimizer="adam", warmup=3)
    assert from_dict(TrainingRecipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert all(field.doc for field in describe(TrainingRecipe))
