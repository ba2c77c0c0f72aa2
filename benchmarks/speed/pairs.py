"""Timing two programs in turn, each run in a process of its own.

One round runs the plain loops, dsdistill, and the plain loops once more with a C allocator told to keep freed memory:
`synthesize` and `evaluate` have the allocator keep their (smaller) blocks, and plain loops would gain from that too.
On an accelerator, whose memory that allocator does not give, the last is left out.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.schema import RESULTS, ROOT, Comparison, Equality
from benchmarks.speed.quiet import OtherLoad, wait_for_quiet
from benchmarks.writing import commit, write_result
from dsdistill.core.device import synchronize

VARIANTS = {
    "loops": ["--worker", "loops"],
    "dsdistill": ["--worker", "dsdistill"],
    "loops, memory kept": ["--worker", "loops", "--keep-memory"],
}
OTHERS = 0.15  # cores that other programs may use during a timing
REPEATS = 4
COMPARISONS = {
    "both as they come": ("loops", "dsdistill"),
    "loops with a tuned C allocator": ("loops, memory kept", "dsdistill"),
}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all speed benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--runs", type=int, default=5, help="processes of each program, in turn")
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="result file; default: one in benchmarks/results")
    made.add_argument("--worker", choices=("loops", "dsdistill"), help=argparse.SUPPRESS)
    made.add_argument("--keep-memory", action="store_true", help=argparse.SUPPRESS)
    return made


def work(
    options: argparse.Namespace, warm: Iterable[Callable[[], None]], program: Callable[[], None], steps: int
) -> None:
    """In a worker process: run the programs in ``warm``, then time ``program`` and print the mean seconds."""
    device = torch.device(options.device)
    if options.keep_memory:
        keep_freed_memory()
    for warmup in warm:
        warmup()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        program()
    synchronize(device)
    print(json.dumps({"seconds": (time.perf_counter() - begin) / steps}))


def keep_freed_memory() -> None:
    """Tell glibc's malloc to give nothing back to the system, in this process."""
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    if platform.libc_ver()[0] != "glibc" or not all(ctypes.CDLL(None).mallopt(*pair) for pair in settings):
        sys.exit("the allocator of this C library cannot be tuned")


def compared(device: str) -> dict[str, tuple[str, str]]:
    """Which variants are compared on a device, by label."""
    own = list(COMPARISONS) if torch.device(device).type == "cpu" else list(COMPARISONS)[:1]
    return {label: COMPARISONS[label] for label in own}


def measure(module: str, runs: int, names: Iterable[str] = VARIANTS) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of variants, ``runs`` rounds, with the options of this process; cores that others used meanwhile.

    A process during which other programs used more than ``OTHERS`` cores is repeated, at most ``REPEATS`` times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    loads = []
    for run in range(runs):
        for name in seconds:
            arguments = VARIANTS[name]
            for _ in range(REPEATS):
                wait_for_quiet(OTHERS, patience=120)
                with OtherLoad() as others:
                    value = _once(module, arguments)
                print(
                    f"round {run + 1}/{runs}  {name:18s} {value:.4f} s  (others: {others.cores:.2f} cores)", flush=True
                )
                if others.cores <= OTHERS:
                    break
            seconds[name].append(value)
            loads.append(round(others.cores, 3))
    return seconds, loads


def _once(module: str, arguments: list[str]) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    line = [sys.executable, "-m", module, *sys.argv[1:], *arguments]
    done = subprocess.run(line, cwd=ROOT, env=clean, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def publish(options: argparse.Namespace, module: str, name: str, content: dict[str, Any]) -> None:
    """Measure all variants, print the ratios and write the result."""
    started, pairs = commit(), compared(options.device)
    seconds, loads = measure(module, options.runs, dict.fromkeys(name for pair in pairs.values() for name in pair))
    found = [Comparison.of(label, a, b, seconds[a], seconds[b]) for label, (a, b) in pairs.items()]
    for one in found:
        a, b = (statistics.median(values) for values in (one.a, one.b))
        ratios = f"median ratio {one.median_ratio:.2f} ({one.min_ratio:.2f} to {one.max_ratio:.2f}, n={one.n})"
        print(f"{one.label}: {one.a_name} {a:.3f} s, {one.b_name} {b:.3f} s, {ratios}")
    out = options.out or RESULTS / f"{name}-{torch.device(options.device).type}.json"
    content |= {"comparisons": [one.model_dump() for one in found], "other_load": max(loads)}
    write_result(out, content, seed=options.seed, started=started, device=options.device)
    print(f"written to {out}")


def equality(quantity: str, ours: Tensor, other: Tensor, tolerance: float, *, median: bool = False) -> Equality:
    """Largest difference of two tensors (with ``median``: that of the median row), relative to the largest magnitude.

    Raises:
        pydantic.ValidationError: it is above ``tolerance``.
    """
    differences = (ours - other).abs()
    absolute = float(differences.flatten(1).amax(1).median() if median else differences.max())
    return Equality(
        quantity=quantity,
        dtype=str(ours.dtype).removeprefix("torch."),
        absolute=absolute,
        relative=absolute / float(other.abs().max()),
        tolerance=tolerance,
    )
