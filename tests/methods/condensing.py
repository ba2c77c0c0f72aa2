"""Gradient condensation written as plain loops in float64: what DC and DSA must give, update by update."""

from dataclasses import fields

import torch
from conftest import make_images
from torch.nn.functional import cross_entropy

from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run
from dsdistill.objectives import layerwise_cosine


class DoubleSource(ImageSource):
    """Gives its images in float64."""

    def gather(self, indices):
        return super().gather(indices).double()


def double_run(*, chunk=1000, classes=(0, 1, 2), mirror_safe=True):
    source = DoubleSource(
        "toy", ["red", "green", "blue"], *make_images(12, 3, (3, 8, 8), seed=0), mirror_safe=mirror_safe
    )
    return Run(source.train_only(), torch.device("cpu"), Rng(0), classes, chunk)


def start(method, run):
    return method.start(run, Job("all", run.classes))


def settings_of(method):
    """Every setting by its name."""
    return {field.name: getattr(method, field.name) for field in fields(method)}


def learned(method, run, steps=None):
    """The stored pixels after so many steps, all if None."""
    state = start(method, run)
    for iteration in range(method.steps if steps is None else steps):
        method.step(run, state, iteration)
    return state.images.pixels.detach()


def settle(run, network, i):
    """Batch normalisation by hand: 16 real images of each class, then these layers alone in evaluation mode."""
    network.train()
    norms = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    if norms:
        with torch.no_grad():
            network(run.source.gather(run.source.per_class_indices(run.classes, 16, run.rng.at("batchnorm", i))))
    for norm in norms:
        norm.eval()


def slow_condensation(method, run, *, distance=layerwise_cosine, double_pairs=False):
    """The pixels after all iterations; ``double_pairs`` shows every image together with its mirror image."""
    source, (outer, epochs) = run.source, method.loops
    augmentation = method.augmentation.suited(source.mirror_safe) if method.augmentation else None
    state = start(method, run)
    pixels, labels = state.images.pixels.detach().clone(), state.labels.classes
    speed = torch.zeros_like(pixels)

    def pairs(images, targets):
        return (torch.cat([images, images.flip(3)]), targets.repeat(2)) if double_pairs else (images, targets)

    for k in range(method.iterations):
        network = method.network.build(
            source.shape, source.num_classes, generator=run.rng.at("network", k), device="cpu"
        )
        parameters = list(network.parameters())
        speeds = [torch.zeros_like(parameter) for parameter in parameters]  # of training the network
        for t in range(outer):
            i = k * outer + t
            settle(run, network, i)
            leaf = pixels.clone().requires_grad_()
            index = source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", i))
            record = None
            if augmentation:
                record = augmentation.sample(len(run.classes), source.shape, run.rng.at("views", i))
            total = torch.zeros(())
            for position, label in enumerate(run.classes):
                rows = index[source.targets[index] == label]
                sides = []
                for images, targets in (
                    (source.gather(rows), source.targets[rows]),
                    pairs(leaf[labels == label], labels[labels == label]),
                ):
                    shown = augmentation.apply(images, record, [position] * len(images)) if augmentation else images
                    loss = cross_entropy(network(shown), targets)
                    sides.append(torch.autograd.grad(loss, parameters, create_graph=True))
                real = [gradient.detach() for gradient in sides[0]]
                total = total + distance(real, sides[1])
            (gradient,) = torch.autograd.grad(total, leaf)
            speed = method.momentum * speed + gradient
            pixels = pixels - (method.lr_images or 0.1) * speed
            if t < outer - 1:
                _train(method, run, network, speeds, pixels, labels, augmentation, epochs, i, pairs)
    return pixels


def _train(method, run, network, speeds, pixels, labels, augmentation, epochs, i, pairs):
    network.train()
    streams = run.rng.within("inner", i)
    order, views = streams.at("order"), streams.at("views")
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(pixels), generator=order), method.batch_size):
            images, targets = pixels[rows], labels[rows]
            if augmentation:
                images, targets = _interleaved(*pairs(images, targets), len(rows))
                record = augmentation.sample(len(images), run.source.shape, views, per="image")
                images = augmentation.apply(images, record)
            else:
                images, targets = pairs(images, targets)
            loss = cross_entropy(network(images), targets)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, speed, gradient in zip(network.parameters(), speeds, gradients, strict=True):
                    speed.mul_(method.momentum_network).add_(gradient)
                    parameter -= method.lr_network * speed


def _interleaved(images, targets, stored):
    """Pairs of an image and its mirror image one after the other, the order in which views are drawn for them."""
    order = torch.arange(len(images)).view(-1, stored).T.flatten()
    return images[order], targets[order]
