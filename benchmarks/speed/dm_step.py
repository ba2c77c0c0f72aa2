"""One outer step of distribution matching against a plain loop over classes, on random images of CIFAR-10's size."""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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
from dsdistill.augmentations import Views
from dsdistill.engine import Run, State
from dsdistill.methods import DM

MODULE = "benchmarks.speed.dm_step"


def make_method(options: argparse.Namespace) -> DM:
    """The settings of the paper."""
    return DM(ipc=options.ipc, real_batch=options.real_batch)


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step the plain way."""
    device, ipc = torch.device(options.device), options.ipc
    images, members, synthetic = plain_start(options)
    optimizer = torch.optim.SGD([synthetic], lr=1.0, momentum=0.5)

    def step() -> None:
        network = PlainConvNet(options.classes).to(device)
        network.train()
        for parameter in network.parameters():
            parameter.requires_grad = False
        loss = torch.tensor(0.0, device=device)
        for c in range(options.classes):
            real = images[np.random.permutation(members[c])[: options.real_batch]]  # noqa: NPY002
            fake = synthetic[c * ipc : (c + 1) * ipc].reshape(ipc, *SHAPE)
            seed = int(torch.randint(100_000, ()))
            op = OPS[int(torch.randint(len(OPS), ()))]
            torch.manual_seed(seed)
            real = random_view(real, op, shared=True)
            torch.manual_seed(seed)
            fake = random_view(fake, op, shared=True)
            torch.manual_seed(seed + 1)
            features, learned = network.embed(real).detach(), network.embed(fake)
            loss = loss + torch.sum((torch.mean(features, dim=0) - torch.mean(learned, dim=0)) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def check(options: argparse.Namespace, dtype: torch.dtype, iterations: int = 3) -> list[pairs.Equality]:
    """Loss and image gradient of both programs from the same weights, real images, views; see `loss_and_gradient`."""
    with precision(dtype) as kind:
        method = make_method(options)
        run, state = stage(method, make_source(options, kind), options)
        return worst([_compare(method, run, state, iteration) for iteration in range(iterations)])


def _compare(method: DM, run: Run, state: State, iteration: int) -> list[pairs.Equality]:
    index = run.source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", iteration))
    assert method.augmentation is not None
    generator = run.rng.at("views", iteration, device="cpu")
    views = method.augmentation.sample(len(run.classes), SHAPE, generator)
    network = PlainConvNet(run.source.num_classes).to(run.device)
    network.copy_from(run.network(method.network, iteration)).requires_grad_(False)
    (pixels,) = state.images.parameters()
    copy = pixels.detach().clone().requires_grad_(True)
    real = run.source.gather(index).split(run.source.sizes_per_class(run.classes, method.real_batch))
    loss = _slow_loss(network, views, real, copy.split(method.ipc))
    (gradient,) = torch.autograd.grad(loss, copy)
    reported = method.step(run, state, iteration)["loss"]
    return loss_and_gradient(reported, loss, pixels, gradient)


def _slow_loss(network: PlainConvNet, views: Views, real: tuple[Tensor, ...], learned: tuple[Tensor, ...]) -> Tensor:
    loss = torch.zeros((), device=real[0].device)
    for op, values, some, others in zip(views.ops, views.values, real, learned, strict=True):
        sides = [torch.stack([given_view(image, op, values) for image in images]) for images in (some, others)]
        means = [network.embed(images).mean(0) for images in sides]
        loss = loss + (means[0] - means[1]).square().sum()
    return loss


def main() -> None:
    options = step_parser(__doc__, real_batch=256, steps=5).parse_args()
    programs = {"loops": loops, "dsdistill": lambda options: stepper(make_method(options), options)}
    benchmark(options, MODULE, "DM step", programs, check, {"real_batch": 64, "per_class": 1000})


if __name__ == "__main__":
    main()
