"""Single steps of a method outside the engine, and what they draw: for comparison with slow formulas."""

import torch

from dsdistill.core.rng import Rng
from dsdistill.engine import Job, Run

CPU = torch.device("cpu")


def run_of(source, *, classes=None, chunk=1000, seed=0):
    """A run as the engine makes it."""
    classes = tuple(range(source.num_classes)) if classes is None else classes
    return Run(source.train_only(), CPU, Rng(seed), classes, chunk)


def begin(method, run):
    """The state at the start of a run of one job."""
    return method.start(run, Job("all", run.classes))


def real_images(method, run, iteration):
    """The real images of each class that a step draws, float64."""
    source = run.source
    index = source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", iteration))
    images, targets = source.gather(index).double(), source.targets[index]
    return [images[targets == label] for label in run.classes]


def shown(method, run, iteration, position, images):
    """The images of the class at a position of ``run.classes``, one by one under that class's view."""
    suited = method.augmentation.suited(run.source.mirror_safe) if method.augmentation else None
    if suited is None:
        return images
    generator = run.rng.at("views", iteration, device="cpu")
    record = suited.sample(len(run.classes), run.source.shape, generator, per="class")
    return torch.cat([suited.apply(image[None], record, [position]) for image in images])
