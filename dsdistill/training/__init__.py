"""Training networks on images: the settings, and the loop. Methods and the evaluator use the same one."""

from dsdistill.training.loop import TrainingSet, make_optimizer, train, train_together
from dsdistill.training.recipe import TrainingRecipe

__all__ = ["TrainingRecipe", "TrainingSet", "make_optimizer", "train", "train_together"]
