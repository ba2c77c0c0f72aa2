"""One outer iteration of gradient matching under Siamese views (DSA): image updates, and training in between.

Against plain loops over classes and a data loader, on random images of CIFAR-10's size.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed import pairs
from benchmarks.speed.dm_step import SHAPE, DoubleSource, make_source
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from dsdistill.augmentations import Views
from dsdistill.core.device import default_chunk, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run, State
from dsdistill.methods import DSA

MODULE = "benchmarks.speed.dc_step"
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}
CHECKED = {"real_batch": 16, "inner_epochs": 2, "outer_loop": 2, "per_class": 500}  # most, in the equality check


def make_run(source: ImageSource, options: argparse.Namespace) -> tuple[DSA, Run, State]:
    """A run as `dsdistill.synthesize` sets it up."""
    device = torch.device(options.device)
    settle_allocator(device)
    method = DSA(
        ipc=options.ipc,
        real_batch=options.real_batch,
        outer_loop=options.outer_loop,
        inner_epochs=options.inner_epochs,
    )
    job = Job("all", tuple(range(source.num_classes)))
    run = Run(
        source=source.train_only().to(device),
        device=device,
        rng=Rng(options.seed, device=device),
        classes=job.classes,
        chunk=default_chunk(source.shape, device),
    ).scoped(job)
    state = method.start(run, job)
    state.images.to(device)
    state.labels.to(device)
    return method, run, state


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one outer iteration with dsdistill."""
    method, run, state = make_run(make_source(options), options)
    iteration = iter(range(sys.maxsize))

    def outer() -> None:
        for _ in range(options.outer_loop):
            float(method.step(run, state, next(iteration))["loss"])

    return outer


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one outer iteration the plain way."""
    source = make_source(options)
    device, ipc = torch.device(options.device), options.ipc
    np.random.seed(options.seed)  # noqa: NPY002 (the field's scripts draw from the global generator)
    torch.manual_seed(options.seed)
    members = [list(range(c * options.per_class, (c + 1) * options.per_class)) for c in range(options.classes)]
    images = source.normalization.standardize(source.images).to(device)
    synthetic = torch.cat([images[np.random.permutation(rows)[:ipc]] for rows in members])  # noqa: NPY002
    synthetic = synthetic.detach().clone().requires_grad_(True)
    labels = torch.arange(options.classes, device=device).repeat_interleave(ipc)
    optimizer = torch.optim.SGD([synthetic], lr=0.1, momentum=0.5)
    criterion = nn.CrossEntropyLoss().to(device)

    def outer() -> None:
        network = PlainConvNet(options.classes).to(device)
        network.train()
        parameters = list(network.parameters())
        trainer = torch.optim.SGD(parameters, lr=0.01)
        for t in range(options.outer_loop):
            loss = torch.tensor(0.0, device=device)
            for c in range(options.classes):
                real = images[np.random.permutation(members[c])[: options.real_batch]]  # noqa: NPY002
                fake = synthetic[c * ipc : (c + 1) * ipc].reshape(ipc, *SHAPE)
                op, seed = OPS[int(torch.randint(len(OPS), ()))], int(torch.randint(100_000, ()))
                torch.manual_seed(seed)
                real = random_view(real, op, shared=True)
                torch.manual_seed(seed)
                fake = random_view(fake, op, shared=True)
                torch.manual_seed(seed + 1)
                wanted = torch.ones(len(real), device=device, dtype=torch.long) * c
                target = torch.autograd.grad(criterion(network(real), wanted), parameters)
                target = tuple(gradient.detach().clone() for gradient in target)
                given = torch.autograd.grad(
                    criterion(network(fake), labels[c * ipc : (c + 1) * ipc]), parameters, create_graph=True
                )
                loss = loss + _distance(target, given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if t < options.outer_loop - 1:
                _train(network, trainer, criterion, synthetic.detach().clone(), labels, options.inner_epochs)

    return outer


def _distance(real: tuple[Tensor, ...], synthetic: tuple[Tensor, ...]) -> Tensor:
    total = torch.tensor(0.0, device=real[0].device)
    for a, b in zip(real, synthetic, strict=True):
        if a.dim() == 1:
            continue
        rows, others = a.reshape(len(a), -1), b.reshape(len(b), -1)
        lengths = torch.norm(rows, dim=-1) * torch.norm(others, dim=-1)
        total = total + torch.sum(1 - torch.sum(rows * others, dim=-1) / (lengths + 0.000001))
    return total


def _train(
    network: nn.Module,
    trainer: torch.optim.Optimizer,
    criterion: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
) -> None:
    loader = DataLoader(TensorDataset(images, labels), batch_size=256, shuffle=True, num_workers=0)
    seen = right = total = 0.0
    for _ in range(epochs):
        for batch, wanted in loader:
            shown = random_view(batch, OPS[int(torch.randint(len(OPS), ()))], shared=False)
            output = network(shown)
            loss = criterion(output, wanted)
            right += float((output.argmax(1) == wanted).sum().item())
            total += loss.item() * len(batch)
            seen += len(batch)
            trainer.zero_grad()
            loss.backward()
            trainer.step()


def check(options: argparse.Namespace, dtype: torch.dtype) -> list[pairs.Equality]:
    """Both programs from the same weights, real images, views and orders.

    Compared are the loss and the image gradient of the first update, and in float64 also the images after the outer
    iteration. In float32 a value within rounding of the kink of a ReLU may fall on either side of it, so there the
    median image has to agree, not every one.

    Raises:
        pydantic.ValidationError: they differ by more than the tolerance.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        kind = DoubleSource if dtype == torch.float64 else ImageSource
        method, run, state = make_run(make_source(options, kind), options)
        (pixels,) = state.images.parameters()
        slow = _Slow(method, run, pixels.detach().clone(), state.labels.classes.to(run.device))
        found = []
        for iteration in range(options.outer_loop):
            loss, gradient = slow.update(iteration)
            reported = method.step(run, state, iteration)["loss"]
            assert pixels.grad is not None
            if iteration == 0:
                strict = TOLERANCES[dtype]
                found.append(pairs.equality("loss", reported, loss, strict))
                found.append(pairs.equality("gradient, median image", pixels.grad, gradient, strict, median=True))
        if dtype == torch.float64:
            found.append(pairs.equality("gradient after training", pixels.grad, gradient, strict))
            found.append(pairs.equality("images after all updates", pixels.detach(), slow.pixels, strict))
    finally:
        torch.set_default_dtype(before)
    return found


class _Slow:
    """The same outer iteration, class by class and image by image, from the draws that dsdistill makes."""

    def __init__(self, method: DSA, run: Run, pixels: Tensor, labels: Tensor) -> None:
        self.method, self.run, self.pixels, self.labels = method, run, pixels, labels
        self.speed = torch.zeros_like(pixels)
        self.network = PlainConvNet(run.source.num_classes).to(run.device)
        self.network.copy_from(run.network(method.network, 0))

    def update(self, iteration: int) -> tuple[Tensor, Tensor]:
        method, run, source = self.method, self.run, self.run.source
        index = source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", iteration))
        rows = index.split(source.sizes_per_class(run.classes, method.real_batch))
        assert method.augmentation is not None
        views = method.augmentation.sample(len(run.classes), SHAPE, run.rng.at("views", iteration, device="cpu"))
        leaf = self.pixels.clone().requires_grad_(True)
        loss = torch.zeros((), device=run.device)
        for c in range(len(run.classes)):
            real = self._gradients(source.gather(rows[c]), c, views, create_graph=False)
            given = self._gradients(leaf[self.labels == c], c, views, create_graph=True)
            loss = loss + _distance(real, given)
        (gradient,) = torch.autograd.grad(loss, leaf)
        self.speed = method.momentum * self.speed + gradient
        self.pixels = self.pixels - 0.1 * self.speed
        if iteration < method.loops[0] - 1:
            self._train(iteration)
        return loss.detach(), gradient

    def _gradients(self, images: Tensor, c: int, views: Views, *, create_graph: bool) -> tuple[Tensor, ...]:
        shown = torch.stack([given_view(image, views.ops[c], views.values[c]) for image in images])
        wanted = torch.full((len(images),), c, device=images.device)
        loss = nn.functional.cross_entropy(self.network(shown), wanted)
        return torch.autograd.grad(loss, list(self.network.parameters()), create_graph=create_graph)

    def _train(self, iteration: int) -> None:
        streams = self.run.rng.within("inner", iteration)
        order, draws = (streams.at(name, device="cpu") for name in ("order", "views"))
        trainer = torch.optim.SGD(self.network.parameters(), lr=self.method.lr_network)
        assert self.method.augmentation is not None
        for _ in range(self.method.loops[1]):
            for rows in torch.randperm(len(self.pixels), generator=order).split(self.method.batch_size):
                images = self.pixels[rows.to(self.pixels.device)]
                views = self.method.augmentation.sample(len(images), SHAPE, draws, per="image")
                shown = torch.stack(
                    [given_view(image, views.ops[i], views.values[i]) for i, image in enumerate(images)]
                )
                trainer.zero_grad()
                nn.functional.cross_entropy(self.network(shown), self.labels[rows.to(self.labels.device)]).backward()
                trainer.step()


def main() -> None:
    parser = pairs.parser(__doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=5000, help="real images of each class")
    parser.add_argument("--real-batch", type=int, default=256)
    parser.add_argument("--outer-loop", type=int, default=2, help="image updates of an outer iteration")
    parser.add_argument("--inner-epochs", type=int, default=50, help="epochs of training between two updates")
    parser.add_argument("--steps", type=int, default=1, help="timed outer iterations of each process")
    parser.add_argument("--warmups", type=int, default=1)
    options = parser.parse_args()
    if options.worker:
        program = loops(options) if options.worker == "loops" else ours(options)
        return pairs.work(options, [program] * options.warmups, program, options.steps)
    small = {name: min(most, getattr(options, name)) for name, most in CHECKED.items()}
    checked = argparse.Namespace(**{**vars(options), **small})
    equality = [one for dtype in TOLERANCES for one in check(checked, dtype)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    names = ("ipc", "classes", "per_class", "real_batch", "outer_loop", "inner_epochs", "steps")
    title = (
        f"DSA outer iteration, 3x32x32, {options.classes} classes, IPC {options.ipc}, real batch {options.real_batch}, "
        f"{options.outer_loop} updates, {options.inner_epochs} epochs between"
    )
    content = {
        "kind": "speed",
        "title": title,
        "unit": "outer iteration",
        "settings": {name: getattr(options, name) for name in names},
        "warmups": options.warmups,
        "target": 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    pairs.publish(options, MODULE, "speed-dc_step", content)


if __name__ == "__main__":
    main()
