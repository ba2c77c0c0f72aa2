"""An outer step of trajectory matching written plainly: networks copied, every step's graph kept; tables of presets."""

import copy
from operator import attrgetter

import torch
from torch import nn

from dsdistill.augmentations import Siamese
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


def stepped_by_hand(method, run, state, iterations):
    """What a method with one stop learns in so many steps, after each: pixels, r of the step size, logits of labels.

    Gradients are those of `followed`; the optimisers are torch's, with the momenta that the papers name. The state is
    used up.
    """
    learned = [next(state.images.parameters()), state.extras["lr"].raw, *state.labels.parameters()]
    rates, momenta = (method.lr_images, method.lr_lr, method.lr_labels), (0.5, 0.5, 0.9)
    optimizers = [
        torch.optim.SGD([parameter], lr=lr, momentum=momentum)
        for parameter, lr, momentum in zip(learned, rates, momenta, strict=True)
    ]
    for iteration in range(iterations):
        segment = method.segment(run, iteration)
        start, target = segment.after(0, method.expert_epochs)
        path, images, targets, rate = followed(method, run, state, iteration, start)
        found = torch.autograd.grad(gap(path[-1], start, target), (images, targets, rate))
        decoded, owner = state.images.decode()
        made = decoded, state.labels.target(owner), state.extras["lr"]()
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(made, [gradient.float() for gradient in found])
        for optimizer in optimizers:
            optimizer.step()
        yield [parameter.detach().clone() for parameter in learned]


def compare_by_hand(method, run, iterations, begin):
    """A method must learn what `stepped_by_hand` does, in each of so many steps, to single precision."""
    state, twin = begin(method, run), begin(method, run)
    learned = [next(state.images.parameters()), state.extras["lr"].raw, *state.labels.parameters()]
    before = [parameter.detach().clone() for parameter in learned]
    for iteration, wanted in enumerate(stepped_by_hand(method, run, twin, iterations)):
        method.step(run, state, iteration)
        for found, expected, old in zip(learned, wanted, before, strict=True):
            moved = float((expected - old).norm())
            assert moved > 0
            assert float((found.detach() - expected).norm()) < 2e-3 * moved
        before = wanted


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
        assert made.augmentation == made.experts.training.augmentation == Siamese(), name
        found[name] = (*attrgetter(*columns)(made), "zca='unit'" in preset.source)
    return found
