"""One outer step of trajectory matching against a plain unroll, on random images of CIFAR-10's size.

A student makes T steps on the synthetic images, and their pixels and its step size are updated along the gradient
through all of them. Experts are random points instead of trained ones: reading them is no part of what is timed.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.speed import pairs
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from benchmarks.speed.stage import (
    SHAPE,
    TOLERANCES,
    loss_and_gradient,
    make_source,
    plain_start,
    precision,
    stage,
    stepper,
    worst,
)
from dsdistill.augmentations import SiameseViews
from dsdistill.engine import Run, Shared, State
from dsdistill.experts import Trajectories
from dsdistill.matching.trajectory import mini_batches
from dsdistill.methods import MTT
from dsdistill.networks import Backward, FlatNetwork, NetworkSpec

MODULE = "benchmarks.speed.mtt_step"
FAR = 0.01  # of each parameter's distance from start to target, as far as experts go in some steps
CHECKED_STEPS = 5  # most, in the equality check: in float32, kinks of ReLUs add up over steps,
COMPILED_STEPS = 2  # and sooner where a compiler rounds otherwise than the plain program does


class RandomExperts(Trajectories):
    """Random points instead of an expert's snapshots, of the type that networks have by default."""

    def __init__(self, run: Run, spec: NetworkSpec, epochs: int) -> None:
        self.network = FlatNetwork(run.network(spec, 0))
        self.count, self.epochs, self.folder = 1, epochs, None
        start, generator = self.network.vector(), run.rng.at("points", device="cpu")
        far = [FAR * torch.randn(start.shape, generator=generator).to(start) for _ in range(epochs)]
        self._rows = torch.stack(list(itertools.accumulate(far, initial=start)))

    def snapshots(self, expert: int, epochs: Sequence[int]) -> Tensor:
        """Points (len(epochs), P)."""
        return self._rows[list(epochs)]


_made: "WeakKeyDictionary[Shared, RandomExperts]" = WeakKeyDictionary()


class RandomMTT(MTT):
    """MTT that follows random experts."""

    def trajectories(self, run: Run) -> Trajectories:
        """The same ones throughout a run."""
        if run.shared not in _made:
            _made[run.shared] = RandomExperts(run, self.network, self.last_epoch)
        return _made[run.shared]


def make_method(options: argparse.Namespace) -> RandomMTT:
    """The settings of the paper for CIFAR-10 and IPC 1, but for the number of steps."""
    return RandomMTT(
        ipc=options.ipc,
        student_steps=options.student_steps,
        batch_size=options.batch_size,
        max_start_epoch=2,
        lr_images=100.0,
        lr_lr=1e-7,
        backward=options.backward,
    )


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step the plain way: a graph through all steps of the student, all images at once."""
    method, device = make_method(options), torch.device(options.device)
    _, _, synthetic = plain_start(options)
    labels = torch.arange(options.classes, device=device).repeat_interleave(options.ipc)
    rate = torch.tensor(method.lr_student, device=device, requires_grad=True)
    of_images = torch.optim.SGD([synthetic], lr=method.lr_images, momentum=method.momentum)
    of_rate = torch.optim.SGD([rate], lr=method.lr_lr, momentum=method.momentum)
    start = [parameter.detach() for parameter in PlainConvNet(options.classes).to(device).parameters()]
    target = [parameter + FAR * torch.randn_like(parameter) for parameter in start]
    size = method.batch_size or len(labels)

    def step() -> None:
        network = PlainConvNet(options.classes).to(device)
        network.train()
        order: list[Tensor] = []
        batches = []
        for _ in range(options.student_steps):
            if not order:
                order = list(torch.split(torch.randperm(len(labels)), size))
            rows = order.pop()
            shown = random_view(synthetic[rows], OPS[int(torch.randint(len(OPS), ()))], shared=False)
            batches.append((shown, labels[rows]))
        loss = unrolled(network, start, target, rate, batches)
        of_images.zero_grad()
        of_rate.zero_grad()
        loss.backward()
        of_images.step()
        of_rate.step()
        loss.item()

    return step


def unrolled(
    network: PlainConvNet,
    start: Sequence[Tensor],
    target: Sequence[Tensor],
    rate: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """The outer loss, differentiable: all steps of the student with their graphs.

    Args:
        start: of each parameter; the student's own.
        target: where it should end.
        rate: its step size, a scalar.
        batches: images as shown and classes of each step.
    """
    names = [name for name, _ in network.named_parameters()]
    theta = [parameter.detach().clone().requires_grad_(True) for parameter in start]
    for shown, wanted in batches:
        output = functional_call(network, dict(zip(names, theta, strict=True)), (shown,))
        gradients = torch.autograd.grad(F.cross_entropy(output, wanted), theta, create_graph=True)
        theta = [parameter - rate * gradient for parameter, gradient in zip(theta, gradients, strict=True)]
    left = sum(F.mse_loss(a, b, reduction="sum") for a, b in zip(theta, target, strict=True))
    whole = sum(F.mse_loss(a, b, reduction="sum") for a, b in zip(start, target, strict=True))
    return torch.as_tensor(left / whole)


def check(options: argparse.Namespace, dtype: torch.dtype, iterations: int = 2) -> list[pairs.Equality]:
    """Loss and gradients of both programs from the same points, mini-batches and views; see `loss_and_gradient`.

    Raises:
        pydantic.ValidationError: they differ by more than rounding.
    """
    with precision(dtype) as kind:
        method = make_method(options)
        run, state = stage(method, make_source(options, kind), options)
        return worst([_compare(method, run, state, iteration) for iteration in range(iterations)])


def _compare(method: RandomMTT, run: Run, state: State, iteration: int) -> list[pairs.Equality]:
    (pixels,) = state.images.parameters()
    raw = state.extras["lr"].raw
    copy, rate = pixels.detach().clone().requires_grad_(True), state.extras["lr"]()
    plain = PlainConvNet(run.source.num_classes).to(run.device)
    segment = method.segment(run, iteration)
    ends = segment.after(0, method.expert_epochs)
    start, target = (segment.trajectories.network.split(end) for end in ends)
    batches = _given_batches(method, run, copy, state.labels.classes.to(run.device), iteration)
    loss = unrolled(plain, start, target, rate, batches)
    of_pixels, of_raw = torch.autograd.grad(loss, [copy, raw])
    reported = method.step(run, state, iteration)["loss"]
    # Gradients of gradients, and in float32 every image feels the kinks that any other meets in an earlier step.
    strict = 1e-10 if pixels.dtype == torch.float64 else 1e-2
    return [
        *loss_and_gradient(reported, loss, pixels, of_pixels),
        pairs.equality("gradient of the step size", raw.grad[None], of_raw[None], strict),
    ]


def _given_batches(
    method: RandomMTT, run: Run, pixels: Tensor, labels: Tensor, iteration: int
) -> list[tuple[Tensor, Tensor]]:
    """What the student is shown in each step, image by image, from the draws that dsdistill makes."""
    items = mini_batches(
        len(pixels),
        method.batch_size or len(pixels),
        method.student_steps,
        run.rng.at("batches", iteration, device="cpu"),
    )
    drawn = run.rng.at("views", iteration, device="cpu")
    assert method.augmentation is not None
    batches = []
    for rows in items:
        record = method.augmentation.sample(len(rows), SHAPE, drawn, per="image")
        assert isinstance(record, SiameseViews)
        pieces = zip(pixels[rows.to(pixels.device)], record.ops, record.values, strict=True)
        batches.append((torch.stack([given_view(*piece) for piece in pieces]), labels[rows.to(labels.device)]))
    return batches


def main() -> None:
    parser = pairs.parser(__doc__)
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=50, help="real images of each class, to start from")
    parser.add_argument("--student-steps", type=int, default=20, help="T")
    parser.add_argument("--batch-size", type=int, help="stored images per step of the student; default: all")
    parser.add_argument("--backward", choices=get_args(Backward), default="sweep", help="of dsdistill")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--warmups", type=int, default=1)
    options = parser.parse_args()
    if options.worker:
        program = loops(options) if options.worker == "loops" else stepper(make_method(options), options)
        return pairs.work(options, [program] * options.warmups, program, options.steps)
    most = COMPILED_STEPS if options.backward == "compiled" else CHECKED_STEPS
    small = {"student_steps": min(most, options.student_steps)}
    equality = [one for dtype in TOLERANCES for one in check(argparse.Namespace(**{**vars(options), **small}), dtype)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    names = ("ipc", "classes", "student_steps", "batch_size", "backward", "steps")
    batch = options.batch_size or options.ipc * options.classes
    content = {
        "kind": "speed",
        "title": f"MTT step, 3x32x32, {options.classes} classes, IPC {options.ipc}, {options.student_steps} steps of "
        f"batch {batch}, gradient by {options.backward!r}",
        "unit": "MTT step",
        "settings": {name: getattr(options, name) for name in names},
        "warmups": options.warmups,
        "target": 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    ways = "" if options.backward == "sweep" else f"-{options.backward}"
    pairs.publish(options, MODULE, f"speed-mtt_step-ipc{options.ipc}{ways}", content)


if __name__ == "__main__":
    main()
