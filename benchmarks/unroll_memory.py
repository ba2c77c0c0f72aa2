"""Peak memory and time of the gradient through T steps of a student, taken each way, over T.

    python -m benchmarks.unroll_memory

Random images of CIFAR-10's size, all of them in each step of plain SGD, as in MTT. Each pair of way and T has a process
of its own: one call finds the memory (resident on a CPU, allocated by torch on a GPU) above what is there before, the
following ones are timed. What a first call loads once and for all is loaded before, by one step on one image. On a CPU
the C allocator gives blocks above 1 MiB back while memory is measured, so that what is resident is in use; with its
usual setting, in which calls are timed, a run holds up to some tens of MiB more. Written to benchmarks/results.
"""

import argparse
import ctypes
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil
import torch
from torch import Tensor

from benchmarks.schema import RESULTS, ROOT, Equality, UnrollWay, slowdowns
from benchmarks.speed.pairs import OTHERS, equality
from benchmarks.speed.quiet import OtherLoad, wait_for_quiet
from benchmarks.writing import commit, write_result
from dsdistill.core.device import peak_memory, settle_allocator, synchronize
from dsdistill.engine import frozen
from dsdistill.networks import NetworkSpec
from dsdistill.networks.functional import Backward, FlatNetwork, Outer, Student, Unrolled, backpropagate
from dsdistill.networks.rules import SGD

WAYS: tuple[Backward, ...] = ("unroll", "sweep", "forward", "truncated")
EXACT: tuple[Backward, ...] = ("sweep", "forward")
CLASSES, SHAPE, RATE = 10, (3, 32, 32), 0.01
_M_MMAP_THRESHOLD = -3


class Problem(NamedTuple):
    """A student, what is asked of it, and what it starts and learns from."""

    student: Student
    outer: Outer
    start: Tensor
    rate: Tensor
    images: Tensor
    targets: Tensor


def main() -> None:
    options = _parser().parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options)))
        return
    started, loads = commit(), []
    found = check(options)
    steps = sorted(set(options.steps))
    measured: dict[Backward, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for count in steps:
        for way in options.ways:  # neighbours in time are compared with one another
            wait_for_quiet(OTHERS, patience=options.patience)
            with OtherLoad() as others:
                measured[way].append(_in_own_process(way, count))
            loads.append(round(others.cores, 3))
            print(
                f"{way:9s} T={count:3d}  {json.dumps(measured[way][-1])}  (others: {loads[-1]:.2f} cores)", flush=True
            )
    ways = [
        UnrollWay.of(way, steps, [one["peak_mib"] for one in points], [one["seconds"] for one in points])
        for way, points in measured.items()
    ]
    momentum = f", momentum {options.momentum}" if options.momentum else ""
    size = "x".join(map(str, SHAPE))
    content = {
        "kind": "unroll",
        "title": f"batch {options.batch} of {size}, ConvNet of width {options.width}{momentum}",
        "settings": {name: getattr(options, name) for name in ("batch", "width", "momentum", "repeats")},
        "other_load": max(loads),
        "ways": [way.model_dump() for way in ways],
        "slowdown": slowdowns(ways),
        "equality": [one.model_dump() for one in found],
    }
    target = options.out or RESULTS / f"unroll-memory-{torch.device(options.device).type}.json"
    write_result(target, content, seed=options.seed, started=started, device=options.device)
    print(f"written to {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 40], help="values of T, two or more")
    parser.add_argument("--ways", nargs="+", choices=get_args(Backward), default=list(WAYS))
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each process")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for others to leave the processors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", choices=get_args(Backward), help=argparse.SUPPRESS)
    return parser


def _in_own_process(way: Backward, steps: int) -> dict[str, Any]:
    line = [sys.executable, "-m", "benchmarks.unroll_memory", *sys.argv[1:], "--worker", way, "--steps", str(steps)]
    done = subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def problem(options: argparse.Namespace, steps: int, batch: int, dtype: torch.dtype = torch.float32) -> Problem:
    """The same for every way; the target is a random point as far away as steps of this size lead."""
    generator, device = torch.Generator().manual_seed(options.seed), torch.device(options.device)
    network = NetworkSpec(width=options.width).build(SHAPE, CLASSES, generator=generator, device=device)
    flat = FlatNetwork(frozen(network.to(dtype)))
    start = flat.vector()
    away = RATE * torch.randn(len(start), generator=generator).to(start)
    images = torch.randn(batch, *SHAPE, generator=generator).to(start).requires_grad_()
    targets = torch.arange(batch, device=device) % CLASSES
    student = Student(flat, lambda step, shown, wanted: (shown, wanted), steps, SGD(momentum=options.momentum))
    outer = Outer(lambda ends: (ends[0] - start - away).square().sum() / away.square().sum(), (steps,))
    return Problem(student, outer, start, torch.tensor(RATE).to(start).requires_grad_(), images, targets)


def work(way: Backward, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: MiB that the first call takes, and seconds of the following ones."""
    device, (steps,) = torch.device(options.device), options.steps
    settle_allocator(device)
    backpropagate(*problem(options, 1, 1), way)
    given = problem(options, steps, options.batch)

    def call() -> Unrolled:
        given.images.grad = given.rate.grad = None
        made = backpropagate(*given, way)
        synchronize(device)
        return made

    _give_back_above(2**20)
    taken, seconds = extra_memory(call, device), []
    _give_back_above(2**25)  # as `settle_allocator` has it
    for _ in range(options.repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return {"peak_mib": taken / 2**20, "seconds": seconds}


def _give_back_above(size: int) -> None:
    """Have glibc's malloc, where that is in use, return freed blocks of at least ``size`` bytes to the system."""
    if platform.libc_ver()[0] == "glibc" and not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size):
        sys.exit("the allocator of this C library cannot be tuned")


def extra_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of ``call`` above those held before it.

    Raises:
        RuntimeError: the process held more at an earlier time, so that the peak is not that of the call.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = psutil.Process().memory_info().rss
    earlier = _peak(device)
    call()
    peak = _peak(device)
    if device.type != "cuda" and peak <= earlier:
        raise RuntimeError(f"the call stayed below the {earlier / 2**20:.0f} MiB of an earlier peak: take more images")
    return peak - before


def _peak(device: torch.device) -> int:
    """As `peak_memory`; but what Linux says there of a process began as the size of the one that started it."""
    listing = Path("/proc/self/status")
    if device.type == "cuda" or not listing.exists():
        return peak_memory(device)
    found = re.search(r"^VmHWM:\s*(\d+) kB$", listing.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def check(options: argparse.Namespace, steps: int = 5, batch: int = 4) -> list[Equality]:
    """Gradients in images and step size of the ways that are exact, against those of the unroll, in float64.

    Raises:
        pydantic.ValidationError: they differ.
    """
    small = argparse.Namespace(**{**vars(options), "width": min(8, options.width)})
    by_way = {}
    for way in ("unroll", *EXACT):
        given = problem(small, steps, batch, torch.float64)
        backpropagate(*given, way)
        by_way[way] = given.images.grad, given.rate.grad
    found = []
    for way in EXACT:
        for quantity, ours, theirs in zip(("images", "step size"), by_way[way], by_way["unroll"], strict=True):
            assert ours is not None
            assert theirs is not None
            found.append(equality(f"gradient of the {quantity}, {way}", ours, theirs, 1e-10))
    return found


if __name__ == "__main__":
    main()
