"""What the benchmarks of single steps share: random images of CIFAR-10's size, and a run set up as the engine does."""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

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
    return run, method.start(run, job)


def stepper(method: Synthesizer, options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step with dsdistill and waits for its loss."""
    run, state = stage(method, make_source(options), options)
    iteration = iter(range(sys.maxsize))

    def step() -> None:
        float(method.step(run, state, next(iteration))["loss"])

    return step
