"""What the benchmarks of single steps share: random images of CIFAR-10's size, a run set up as the engine does, the
start of a plain program, the comparison of both, and the measurement."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed import pairs
from dsdistill.core.device import default_chunk, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run, State, Synthesizer

SHAPE = (3, 32, 32)
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


class DoubleSource(ImageSource):
    """Gives its images in float64, for the strict equality check."""

    def gather(self, indices: Tensor) -> Tensor:
        """Standardised images (M, C, H, W)."""
        return super().gather(indices).double()


def make_source(options: argparse.Namespace, kind: type[ImageSource] = ImageSource) -> ImageSource:
    """``options.classes`` times ``options.per_class`` random images, a function of ``options.seed``."""
    generator = torch.Generator().manual_seed(options.seed)
    count = options.classes * options.per_class
    images = torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
    targets = torch.arange(options.classes).repeat_interleave(options.per_class)
    return kind("random images", [f"class {c}" for c in range(options.classes)], images, targets)


def stage(method: Synthesizer, source: ImageSource, options: argparse.Namespace) -> tuple[Run, State]:
    """A run at its first step, as `dsdistill.synthesize` sets it up."""
    device = torch.device(options.device)
    settle_allocator(device)
    job = Job("all", tuple(range(source.num_classes)))
    run = Run(
        source=source.train_only().to(device),
        device=device,
        rng=Rng(options.seed, device=device),
        classes=job.classes,
        chunk=default_chunk(source.shape, device),
    ).scoped(job)
    method.prepare(run)
    state = method.start(run, job)
    state.images.to(device)
    state.labels.to(device)
    return run, state


def stepper(method: Synthesizer, options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step with dsdistill and waits for its loss."""
    run, state = stage(method, make_source(options), options)
    iteration = iter(range(sys.maxsize))

    def step() -> None:
        float(method.step(run, state, next(iteration))["loss"])

    return step


def plain_start(options: argparse.Namespace) -> tuple[Tensor, list[list[int]], Tensor]:
    """Real images (M, C, H, W), members of each class, and synthetic images to learn: how a plain program starts."""
    source = make_source(options)
    np.random.seed(options.seed)  # noqa: NPY002 (the field's scripts draw from the global generator)
    torch.manual_seed(options.seed)
    members = [list(range(c * options.per_class, (c + 1) * options.per_class)) for c in range(options.classes)]
    images = source.normalization.standardize(source.images).to(options.device)
    synthetic = torch.cat([images[np.random.permutation(rows)[: options.ipc]] for rows in members])  # noqa: NPY002
    return images, members, synthetic.detach().clone().requires_grad_(True)


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[type[ImageSource]]:
    """Networks and images of this type; gives the kind of source that hands them out."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield DoubleSource if dtype == torch.float64 else ImageSource
    finally:
        torch.set_default_dtype(before)


def worst(found: Sequence[Sequence[pairs.Equality]]) -> list[pairs.Equality]:
    """Of several iterations, the largest difference of each quantity."""
    return [max(column, key=lambda one: one.relative) for column in zip(*found, strict=True)]


def loss_and_gradient(reported: Tensor, loss: Tensor, pixels: Tensor, gradient: Tensor) -> list[pairs.Equality]:
    """Loss and image gradient of dsdistill (``reported``, ``pixels.grad``) against those of a slow program.

    Float32 gradients agree to rounding in nearly all images, not in all: where a value lies within rounding of the
    kink of a ReLU, the two programs may find themselves on different sides of it. So the bound on the largest
    difference is strict in float64 only; in float32 the median image has to meet it.

    Raises:
        pydantic.ValidationError: they differ by more than that.
    """
    assert pixels.grad is not None
    strict = TOLERANCES[pixels.dtype]
    return [
        pairs.equality("loss", reported, loss.detach(), strict),
        pairs.equality("gradient, largest", pixels.grad, gradient, strict if pixels.dtype == torch.float64 else 0.1),
        pairs.equality("gradient, median image", pixels.grad, gradient, strict, median=True),
    ]


def step_parser(description: str | None, *, real_batch: int, steps: int) -> argparse.ArgumentParser:
    """Options that all benchmarks of steps share."""
    parser = pairs.parser(description)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=5000, help="real images of each class")
    parser.add_argument("--real-batch", type=int, default=real_batch)
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of each process")
    parser.add_argument("--warmups", type=int, default=1)
    return parser


def benchmark(
    options: argparse.Namespace,
    module: str,
    what: str,
    programs: Mapping[str, Callable[[argparse.Namespace], Callable[[], None]]],
    check: Callable[[argparse.Namespace, torch.dtype], list[pairs.Equality]],
    checked: Mapping[str, int],
) -> None:
    """In a worker, time one of the ``programs``; else check that they are equal, then have workers time them in turn.

    Args:
        module: of the benchmark, "benchmarks.speed.NAME".
        what: is timed, with what is special about it.
        programs: "loops" and "dsdistill", each giving a function that does it once.
        checked: largest sizes of the equality check, whose reference takes images one by one.
    """
    if options.worker:
        program = programs[options.worker](options)
        return pairs.work(options, [program] * options.warmups, program, options.steps)
    small = {name: min(most, getattr(options, name)) for name, most in checked.items()}
    equality = [one for dtype in TOLERANCES for one in check(argparse.Namespace(**{**vars(options), **small}), dtype)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    general = {*vars(pairs.parser(None).parse_args([])), "warmups"}
    sizes = f"3x32x32, {options.classes} classes, IPC {options.ipc}, real batch {options.real_batch}"
    kind, _, special = what.partition(", ")
    content = {
        "kind": "speed",
        "title": ", ".join(part for part in (kind, sizes, special) if part),
        "unit": kind,
        "settings": {name: value for name, value in vars(options).items() if name not in general},
        "warmups": options.warmups,
        "target": 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    pairs.publish(options, module, f"speed-{module.rpartition('.')[2]}", content)
