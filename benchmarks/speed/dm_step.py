"""One outer step of distribution matching against a plain loop over classes, on random images of CIFAR-10's size."""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed import pairs
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from dsdistill.augmentations import Views
from dsdistill.core.device import default_chunk, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run, State
from dsdistill.methods import DM

MODULE = "benchmarks.speed.dm_step"
SHAPE = (3, 32, 32)
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
CHECKED_BATCH = 64  # real images of each class in the equality check, whose reference takes them one by one


class DoubleSource(ImageSource):
    """Gives its images in float64, for the strict equality check."""

    def gather(self, indices: Tensor) -> Tensor:
        """Standardised images (M, C, H, W)."""
        return super().gather(indices).double()


def make_source(options: argparse.Namespace, kind: type[ImageSource] = ImageSource) -> ImageSource:
    """Random images, a function of the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    count = options.classes * options.per_class
    images = torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
    targets = torch.arange(options.classes).repeat_interleave(options.per_class)
    return kind("random images", [f"class {c}" for c in range(options.classes)], images, targets)


def make_run(source: ImageSource, options: argparse.Namespace) -> tuple[DM, Run, State]:
    """A run as `dsdistill.synthesize` sets it up."""
    device = torch.device(options.device)
    settle_allocator(device)
    method = DM(ipc=options.ipc, real_batch=options.real_batch)
    job = Job("all", tuple(range(source.num_classes)))
    run = Run(
        source=source.train_only().to(device),
        device=device,
        rng=Rng(options.seed, device=device),
        classes=job.classes,
        chunk=default_chunk(source.shape, device),
    ).scoped(job)
    return method, run, method.start(run, job)


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step with dsdistill."""
    method, run, state = make_run(make_source(options), options)
    iteration = iter(range(sys.maxsize))

    def step() -> None:
        float(method.step(run, state, next(iteration))["loss"])

    return step


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step the plain way."""
    source = make_source(options)
    device, ipc = torch.device(options.device), options.ipc
    np.random.seed(options.seed)  # noqa: NPY002 (the field's scripts draw from the global generator)
    torch.manual_seed(options.seed)
    members = [list(range(c * options.per_class, (c + 1) * options.per_class)) for c in range(options.classes)]
    images = source.normalization.standardize(source.images).to(device)
    synthetic = torch.cat([images[np.random.permutation(rows)[:ipc]] for rows in members])  # noqa: NPY002
    synthetic = synthetic.detach().clone().requires_grad_(True)
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


def check(options: argparse.Namespace, dtype: torch.dtype, iterations: int) -> list[pairs.Equality]:
    """Loss and image gradient of both programs from the same weights, real images and views.

    Float32 gradients agree to rounding in nearly all images, not in all: where a value lies within rounding of the
    kink of a ReLU, the two programs may find themselves on different sides of it. So the bound on the largest
    difference is strict in float64 only; in float32 the median image has to meet it.

    Raises:
        pydantic.ValidationError: they differ by more than that.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        kind = DoubleSource if dtype == torch.float64 else ImageSource
        method, run, state = make_run(make_source(options, kind), options)
        found = [_compare(method, run, state, iteration) for iteration in range(iterations)]
    finally:
        torch.set_default_dtype(before)
    return [max(column, key=lambda one: one.relative) for column in zip(*found, strict=True)]


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
    assert pixels.grad is not None
    strict = TOLERANCES[pixels.dtype]
    return [
        pairs.equality("loss", reported, loss.detach(), strict),
        pairs.equality("gradient, largest", pixels.grad, gradient, strict if pixels.dtype == torch.float64 else 0.1),
        pairs.equality("gradient, median image", pixels.grad, gradient, strict, median=True),
    ]


def _slow_loss(network: PlainConvNet, views: Views, real: tuple[Tensor, ...], learned: tuple[Tensor, ...]) -> Tensor:
    loss = torch.zeros((), device=real[0].device)
    for op, values, some, others in zip(views.ops, views.values, real, learned, strict=True):
        sides = [torch.stack([given_view(image, op, values) for image in images]) for images in (some, others)]
        means = [network.embed(images).mean(0) for images in sides]
        loss = loss + (means[0] - means[1]).square().sum()
    return loss


def main() -> None:
    parser = pairs.parser(__doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=5000, help="real images of each class")
    parser.add_argument("--real-batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--warmups", type=int, default=1)
    options = parser.parse_args()
    if options.worker:
        program = loops(options) if options.worker == "loops" else ours(options)
        return pairs.work(options, [program] * options.warmups, program, options.steps)
    small = {"real_batch": min(CHECKED_BATCH, options.real_batch), "per_class": min(1000, options.per_class)}
    checked = argparse.Namespace(**{**vars(options), **small})
    equality = [one for dtype in TOLERANCES for one in check(checked, dtype, iterations=3)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    settings = {name: getattr(options, name) for name in ("ipc", "classes", "per_class", "real_batch", "steps")}
    title = f"DM step, 3x32x32, {options.classes} classes, IPC {options.ipc}, real batch {options.real_batch}"
    content = {
        "kind": "speed",
        "title": title,
        "unit": "outer step",
        "settings": settings,
        "warmups": options.warmups,
        "target": 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    pairs.publish(options, MODULE, "speed-dm_step", content)


if __name__ == "__main__":
    main()
