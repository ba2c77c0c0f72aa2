"""Labels of two numbers."""

import pytest
import torch

from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.relabelling import Distances
from dsdistill.relabelling.distances import class_distances, distance_loss, lesson_targets
from dsdistill.training import Distillation, TrainingRecipe

TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
A, B = torch.tensor([0]), torch.tensor([1])


def test_distances_are_cross_entropies_with_either_class():
    assert class_distances(TEACHER, A, B)[0].tolist() == pytest.approx([0.356675, 1.609438], abs=1e-6)
    assert class_distances(STUDENT, A, B)[0].tolist() == pytest.approx([0.693147, 1.203973], abs=1e-6)


def test_the_loss_is_their_l1():
    told = class_distances(TEACHER, A, B)
    assert float(distance_loss(STUDENT, told, A, B)) == pytest.approx(0.741937, abs=1e-6)
    assert float(distance_loss(TEACHER, told, A, B)) == 0
    twice = distance_loss(STUDENT.repeat(2, 1), told.repeat(2, 1), A.repeat(2), B.repeat(2))
    assert float(twice) == pytest.approx(2 * 0.741937, abs=1e-6)


def test_cross_entropy_with_the_mixed_classes_comes_beside_it():
    targets = lesson_targets(class_distances(TEACHER, A, B), A, B)
    mixed = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64)
    hard = 0.6 * 0.693147 + 0.4 * 1.203973
    assert float(Distances().loss(STUDENT, targets, mixed)) == pytest.approx(hard + 0.741937, abs=1e-5)
    assert float(Distances(weight=0.5).loss(STUDENT, targets, mixed)) == pytest.approx(hard + 0.741937 / 2, abs=1e-5)
    assert float(Distances(weight=0).loss(STUDENT, targets, A)) == pytest.approx(0.693147, abs=1e-5)


def test_classes_of_many_survive_as_targets():
    own = torch.tensor([20999, 16777215])
    assert lesson_targets(torch.zeros(2, 2), own, own)[:, 2].long().tolist() == own.tolist()


def test_what_it_does_not_know_is_refused():
    targets = lesson_targets(class_distances(TEACHER, A, B), A, B)
    with pytest.raises(ShapeMismatch, match="distances of the teacher"):
        Distances().loss(STUDENT, TEACHER, A)
    with pytest.raises(InvalidSetting, match="lessons that carry classes"):
        Distances().loss(STUDENT, targets)
    with pytest.raises(InvalidSetting, match=r"Distances.temperature = 4.0"):
        Distances(temperature=4.0)


def test_recipes_take_it_as_a_distillation():
    recipe = TrainingRecipe(distillation=Distances(weight=0.5))
    assert isinstance(recipe.distillation, Distillation)
    assert recipe.distillation.weight == 0.5
