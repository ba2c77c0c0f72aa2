"""Peak memory of one step of every method at CIFAR-100's size and IPC 50, with its published batches.

    python -m benchmarks.peak_memory

Each method has a process of its own, on generated images (100 classes of 500). Networks that a method trains beforehand
are trained for a few steps only: what a step needs does not depend on it. Written to benchmarks/results.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import dsdistill as dd
from benchmarks.estimates import Setting, make_source
from benchmarks.schema import RESULTS, ROOT
from benchmarks.writing import commit, write_result
from dsdistill.core.device import peak_memory
from dsdistill.engine import Rehearsal
from dsdistill.engine.run import Execution, prepared_run

METHODS = ("DM", "DataDAM", "DC", "DSA", "IDC", "NCFM", "FYI+DM", "FYI+DataDAM", "FYI+DSA", "FYI+NCFM")
LIMIT_GIB = 24.0
SETTING = Setting(size=32, classes=100, ipc=50, real_batch=0, width=128, steps=1, per_class=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options)))
        return
    started, rows = commit(), []
    for name in options.methods:
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--worker", name]
        command += ["--device", options.device, "--seed", str(options.seed)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    title = "one step, 3x32x32, 100 classes of 500 real images, IPC 50, ConvNet of width 128"
    content = {"kind": "peak", "title": title, "limit_gib": LIMIT_GIB, "rows": rows}
    target = options.out or RESULTS / f"peak-memory-{torch.device(options.device).type}.json"
    write_result(target, content, seed=options.seed, started=started, device=options.device)


def work(name: str, options: argparse.Namespace) -> dict[str, object]:
    """In a process of its own: the first step of a method as `dsdistill.synthesize` makes it."""
    source = make_source(SETTING, options.seed)
    method = dd.create_method(name, ipc=SETTING.ipc)
    run = prepared_run(method, source, seed=options.seed, device=options.device, chunk=None)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    begin = time.perf_counter()
    execution = Execution(method, run, rehearsal=Rehearsal(), limit=1)
    execution()
    return {
        "method": name,
        "chunk": execution.run.chunk,
        "seconds": time.perf_counter() - begin,
        "peak_gib": peak_memory(run.device) / 2**30,
    }


if __name__ == "__main__":
    main()
