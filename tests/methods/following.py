"""An outer step of trajectory matching written plainly: networks copied, every step's graph kept; tables of presets."""

import copy
from operator import attrgetter

import torch
from torch import nn

from dsdistill.matching.trajectory import mini_batches


def images_of(state):
    """Decoded images and targets as leaves, float64, with the item of each image."""
    images, owner = state.images.decode()
    targets = state.labels.target(owner)
    targets = targets.detach().double().requires_grad_() if targets.is_floating_point() else targets
    return images.detach().double().requires_grad_(), targets, owner


def followed(method, run, state, iteration, start, *, momentum=0.0, factor=1.0):
    """The student's parameters (P,) before and after each step, float64, with the leaves that they depend on."""
    images, targets, owner = images_of(state)
    rate = state.extras["lr"]().detach().double().requires_grad_()
    network = copy.deepcopy(method.trajectories(run).network.module).double()
    names = [name for name, _ in network.named_parameters()]
    shapes = [parameter.shape for parameter in network.parameters()]
    generator = run.rng.at("batches", iteration, device="cpu")
    count = state.images.count
    batches = mini_batches(count, method.batch_size or count, method.student_steps, generator)
    drawn = run.rng.at("views", iteration, device="cpu")
    suited = method.augmentation.suited(run.source.mirror_safe) if method.augmentation else None
    theta, velocity, path = start.double(), None, [start.double()]
    theta.requires_grad_()
    for items in batches:
        places = [place for item in items.tolist() for place in range(len(owner)) if int(owner[place]) == item]
        shown = images[places]
        if suited is not None:
            shown = suited.apply(shown, suited.sample(len(places), run.source.shape, drawn, per="image"))
        parts = torch.split(theta, [shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(network, named, (shown,))
        loss = factor * nn.functional.cross_entropy(logits, targets[places])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        velocity = gradient if velocity is None else momentum * velocity + gradient
        theta = theta - rate * velocity
        path.append(theta)
    return path, images, targets, rate


def gap(end, start, target):
    """The normalised distance of two vectors."""
    return ((end - target.double()) ** 2).sum() / ((start.double() - target.double()) ** 2).sum()


COLUMNS = (
    "ipc",
    "student_steps",
    "expert_epochs",
    "max_start_epoch",
    "batch_size",
    "lr_images",
    "lr_lr",
    "lr_student",
    "iterations",
)


def table_of(method, *more):
    """All presets by name: `COLUMNS`, ``more`` (of experts: with dots), and whether images are whitened.

    Everything else must be as by default, and experts must reach as far as students are led.
    """
    columns = (*COLUMNS, *more)
    found = {}
    for name, preset in method.presets.items():
        made = method.preset(name)
        told = {column.split(".")[0] for column in columns}
        assert set(preset.settings) <= told, name
        assert made.last_epoch <= made.experts.training.epochs, name
        found[name] = (*attrgetter(*columns)(made), "zca='unit'" in preset.source)
    return found
