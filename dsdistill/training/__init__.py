"""Training networks on images: the settings, and the loop. Methods and the evaluator use the same one."""

from dsdistill.training.batches import Lesson, Teacher, TrainingSet, sub_batches
from dsdistill.training.distillation import Distillation
from dsdistill.training.loop import train, train_together
from dsdistill.training.optimizer import make_optimizer
from dsdistill.training.recipe import TrainingRecipe

__all__ = [
    "Distillation",
    "Lesson",
    "Teacher",
    "TrainingRecipe",
    "TrainingSet",
    "make_optimizer",
    "sub_batches",
    "train",
    "train_together",
]
