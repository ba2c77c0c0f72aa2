"""One outer iteration of gradient matching under Siamese views (DSA): image updates, and training in between.

Against plain loops over classes and a data loader, on random images of CIFAR-10's size.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed import pairs
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from benchmarks.speed.stage import SHAPE, benchmark, make_source, plain_start, precision, stage, step_parser, stepper
from dsdistill.augmentations import Views
from dsdistill.engine import Run
from dsdistill.methods import DSA

MODULE = "benchmarks.speed.dc_step"
LOOSER = {torch.float32: 1e-3, torch.float64: 1e-9}  # gradients of gradients
CHECKED = {"real_batch": 16, "inner_epochs": 2, "outer_loop": 2, "per_class": 500}  # most, in the equality check


def make_method(options: argparse.Namespace) -> DSA:
    """The settings of the paper, but for the number of updates."""
    return DSA(
        ipc=options.ipc,
        real_batch=options.real_batch,
        outer_loop=options.outer_loop,
        inner_epochs=options.inner_epochs,
    )


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one outer iteration with dsdistill."""
    step = stepper(make_method(options), options)

    def outer() -> None:
        for _ in range(options.outer_loop):
            step()

    return outer


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one outer iteration the plain way."""
    device, ipc = torch.device(options.device), options.ipc
    images, members, synthetic = plain_start(options)
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
    found = []
    with precision(dtype) as kind:
        method = make_method(options)
        run, state = stage(method, make_source(options, kind), options)
        (pixels,) = state.images.parameters()
        slow = _Slow(method, run, pixels.detach().clone(), state.labels.classes.to(run.device))
        for iteration in range(options.outer_loop):
            loss, gradient = slow.update(iteration)
            reported = method.step(run, state, iteration)["loss"]
            assert pixels.grad is not None
            if iteration == 0:
                strict = LOOSER[dtype]
                found.append(pairs.equality("loss", reported, loss, strict))
                found.append(pairs.equality("gradient, median image", pixels.grad, gradient, strict, median=True))
        if dtype == torch.float64:
            found.append(pairs.equality("gradient after training", pixels.grad, gradient, strict))
            found.append(pairs.equality("images after all updates", pixels.detach(), slow.pixels, strict))
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
    parser = step_parser(__doc__, real_batch=256, steps=1)
    parser.add_argument("--outer-loop", type=int, default=2, help="image updates of an outer iteration")
    parser.add_argument("--inner-epochs", type=int, default=50, help="epochs of training between two updates")
    options = parser.parse_args()
    what = f"DSA outer iteration, {options.outer_loop} updates, {options.inner_epochs} epochs between"
    benchmark(options, MODULE, what, {"loops": loops, "dsdistill": ours}, check, CHECKED)


if __name__ == "__main__":
    main()
