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
from benchmarks.speed.stage import SHAPE, TOLERANCES, DoubleSource, make_source, stage, stepper
from dsdistill.data import ImageSource
from dsdistill.methods import DataDAM

MODULE = "benchmarks.speed.datadam_step"
CHECKED_BATCH = 32  # real images of each class in the equality check, whose reference takes them one by one


def make_method(options: argparse.Namespace) -> DataDAM:
    """The settings of the paper."""
    return DataDAM(ipc=options.ipc, real_batch=options.real_batch)


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step the plain way."""
    source = make_source(options)
    device, ipc, classes = torch.device(options.device), options.ipc, options.classes
    np.random.seed(options.seed)  # noqa: NPY002 (the field's scripts draw from the global generator)
    torch.manual_seed(options.seed)
    members = [list(range(c * options.per_class, (c + 1) * options.per_class)) for c in range(classes)]
    images = source.normalization.standardize(source.images).to(device)
    synthetic = torch.cat([images[np.random.permutation(rows)[:ipc]] for rows in members])  # noqa: NPY002
    synthetic = synthetic.detach().clone().requires_grad_(True)
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


def check(options: argparse.Namespace, dtype: torch.dtype, iterations: int) -> list[pairs.Equality]:
    """Loss and image gradient of both from the same weights, real images and views; see `dm_step.check`.

    Raises:
        pydantic.ValidationError: they differ by more than the tolerance.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        kind = DoubleSource if dtype == torch.float64 else ImageSource
        source, method = make_source(options, kind), make_method(options)
        run, state = stage(method, source, options)
        found = [_compare(method, run, state, iteration) for iteration in range(iterations)]
    finally:
        torch.set_default_dtype(before)
    return [max(column, key=lambda one: one.relative) for column in zip(*found, strict=True)]


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
    assert pixels.grad is not None
    strict = TOLERANCES[pixels.dtype]
    return [
        pairs.equality("loss", reported, loss.detach(), strict),
        pairs.equality("gradient, largest", pixels.grad, gradient, strict if pixels.dtype == torch.float64 else 0.1),
        pairs.equality("gradient, median image", pixels.grad, gradient, strict, median=True),
    ]


def main() -> None:
    parser = pairs.parser(__doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=5000, help="real images of each class")
    parser.add_argument("--real-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--warmups", type=int, default=1)
    options = parser.parse_args()
    if options.worker:
        program = loops(options) if options.worker == "loops" else stepper(make_method(options), options)
        return pairs.work(options, [program] * options.warmups, program, options.steps)
    small = {"real_batch": min(CHECKED_BATCH, options.real_batch), "per_class": min(1000, options.per_class)}
    checked = argparse.Namespace(**{**vars(options), **small})
    equality = [one for dtype in TOLERANCES for one in check(checked, dtype, iterations=3)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    settings = {name: getattr(options, name) for name in ("ipc", "classes", "per_class", "real_batch", "steps")}
    title = f"DataDAM step, 3x32x32, {options.classes} classes, IPC {options.ipc}, real batch {options.real_batch}"
    content = {
        "kind": "speed",
        "title": title,
        "unit": "outer step",
        "settings": settings,
        "warmups": options.warmups,
        "target": 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    pairs.publish(options, MODULE, "speed-datadam_step", content)


if __name__ == "__main__":
    main()
