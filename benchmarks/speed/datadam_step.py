"""One outer step of attention matching against a plain program, on random images of CIFAR-10's size.

The plain program views classes one by one, passes all classes of a side together, collects activations with hooks that
clone them, and compares class means on the host, as the authors' code does.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed import pairs
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from benchmarks.speed.stage import (
    SHAPE,
    benchmark,
    loss_and_gradient,
    make_source,
    plain_start,
    precision,
    stage,
    step_parser,
    stepper,
    worst,
)
from dsdistill.methods import DataDAM

MODULE = "benchmarks.speed.datadam_step"


def make_method(options: argparse.Namespace) -> DataDAM:
    """The settings of the paper."""
    return DataDAM(ipc=options.ipc, real_batch=options.real_batch)


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step the plain way."""
    device, ipc, classes = torch.device(options.device), options.ipc, options.classes
    images, members, synthetic = plain_start(options)
    optimizer = torch.optim.SGD([synthetic], lr=1.0, momentum=0.5)

    def gap(real: Tensor, made: Tensor) -> Tensor:
        means = (
            real.reshape(classes, options.real_batch, -1).mean(1).cpu(),
            made.reshape(classes, ipc, -1).mean(1).cpu(),
        )
        return torch.sum((means[0] - means[1]) ** 2)

    def step() -> None:
        network = PlainConvNet(classes).to(device)
        network.train()
        for parameter in network.parameters():
            parameter.requires_grad = False
        real_side, made_side = [], []
        for c in range(classes):
            real = images[np.random.permutation(members[c])[: options.real_batch]]  # noqa: NPY002
            fake = synthetic[c * ipc : (c + 1) * ipc].reshape(ipc, *SHAPE)
            seed, op = int(torch.randint(100_000, ())), OPS[int(torch.randint(len(OPS), ()))]
            for side, batch in ((real_side, real), (made_side, fake)):
                torch.manual_seed(seed)
                side.append(random_view(batch, op, shared=True))
            torch.manual_seed(seed + 1)
        features, maps = hooked(network, torch.cat(real_side))
        learned, made_maps = hooked(network, torch.cat(made_side))
        loss = torch.tensor(0.0)
        for layer in range(len(maps) - 1):
            loss = loss + 100 * gap(attention(maps[layer].detach()), attention(made_maps[layer]))
        loss = loss + 100 * 0.01 * gap(features.detach(), learned)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def hooked(network: PlainConvNet, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features, and a copy of what every ReLU returns."""
    maps: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, result: maps.append(result.clone()))
        for module in network.features
        if isinstance(module, nn.ReLU)
    ]
    features = network.embed(images)
    for handle in handles:
        handle.remove()
    return features, maps


def attention(maps: Tensor) -> Tensor:
    """Fourth powers summed over channels, of length 1."""
    return F.normalize(torch.sum(torch.abs(maps) ** 4, dim=1).view(len(maps), -1), p=2.0)


def check(options: argparse.Namespace, dtype: torch.dtype, iterations: int = 3) -> list[pairs.Equality]:
    """Loss and image gradient of both from the same weights, real images and views; see `loss_and_gradient`."""
    with precision(dtype) as kind:
        method = make_method(options)
        run, state = stage(method, make_source(options, kind), options)
        return worst([_compare(method, run, state, iteration) for iteration in range(iterations)])


def _compare(method: DataDAM, run: Any, state: Any, iteration: int) -> list[pairs.Equality]:
    index = run.source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", iteration))
    assert method.augmentation is not None
    views = method.augmentation.sample(len(run.classes), SHAPE, run.rng.at("views", iteration, device="cpu"))
    network = PlainConvNet(run.source.num_classes).to(run.device)
    network.copy_from(run.network(method.network, iteration)).requires_grad_(False)
    (pixels,) = state.images.parameters()
    copy = pixels.detach().clone().requires_grad_(True)
    real = run.source.gather(index).split(run.source.sizes_per_class(run.classes, method.real_batch))
    loss = torch.zeros((), device=run.device)
    for op, values, *sides in zip(views.ops, views.values, real, copy.split(method.ipc), strict=True):
        seen = [hooked(network, torch.stack([given_view(image, op, values) for image in side])) for side in sides]
        for layer in range(2):
            means = [attention(maps[layer]).mean(0) for _, maps in seen]
            loss = loss + 100 * (means[0] - means[1]).square().sum()
        loss = loss + (seen[0][0].mean(0) - seen[1][0].mean(0)).square().sum()
    (gradient,) = torch.autograd.grad(loss, copy)
    reported = method.step(run, state, iteration)["loss"]
    return loss_and_gradient(reported, loss, pixels, gradient)


def main() -> None:
    options = step_parser(__doc__, real_batch=128, steps=5).parse_args()
    programs = {"loops": loops, "dsdistill": lambda options: stepper(make_method(options), options)}
    benchmark(options, MODULE, "DataDAM step", programs, check, {"real_batch": 32, "per_class": 1000})


if __name__ == "__main__":
    main()
