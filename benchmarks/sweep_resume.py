"""Does a sweep that is killed in the middle of a cell and continued find the same as one left alone?

DM and random real images at three budgets on the bundled digits, in two processes. The sweep is killed with SIGKILL
once some cells are done and another one has made some steps, both drawn from the seed, and then started again.
Compared are the bytes of every synthetic set and the accuracy of every network.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.schema import RESULTS, ROOT
from benchmarks.writing import commit, write_result
from dsdistill import studies
from dsdistill.core import storage
from dsdistill.evaluation import get_protocol
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec

IPC = (1, 10, 50)
POLL = 0.005
FILES = ("images.safetensors", "labels.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200, help="outer steps of DM")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3, help="networks per synthesis seed")
    parser.add_argument("--seeds", type=int, default=3, help="synthesis seeds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moment of the kill")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep-resume-cpu.json")
    parser.add_argument("--sweep", type=Path, help=argparse.SUPPRESS)  # the process that is killed
    options = parser.parse_args()
    if options.sweep:
        sweep(options, options.sweep)
        return
    started = commit()
    with tempfile.TemporaryDirectory() as folder:
        content = compare(options, Path(folder))
    write_result(options.out, content, seed=options.seed, started=started)
    print(f"written to {options.out}")
    if not content["equal"]:
        raise SystemExit("the continued sweep differs from the uninterrupted one")


def sweep(options: argparse.Namespace, out: Path) -> studies.StudyResult:
    """The study itself."""
    network = NetworkSpec(width=32, depth=2)
    return studies.grid(
        "digits",
        [DM(iterations=options.iterations, real_batch=64, network=network), RandomReal()],
        ipc=IPC,
        seeds=options.seeds,
        protocol=replace(get_protocol("dsa"), network=network),
        epochs=options.epochs,
        repeats=options.repeats,
        out=out,
        workers=options.workers,
        devices=["cpu"],
        checkpoint_every=5,
        progress=False,
    )


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sweeps, and the content of the result."""
    alone, killed = folder / "alone", folder / "killed"
    uninterrupted = finished(options, alone)
    print(f"uninterrupted: {uninterrupted:.1f} s")
    kill = kill_in_a_cell(options, killed)
    print(f"killed after {kill['seconds']:.1f} s: {kill['cells_done']} cells done, {kill['steps']} steps of another")
    continued = finished(options, killed)
    print(f"continued: {continued:.1f} s")
    found = [fingerprints(out) for out in (alone, killed)]
    print("equal" if found[0] == found[1] else "DIFFERENT")
    result = studies.report(killed)
    return {
        "kind": "sweep",
        "title": f"DM and random real images on digits, IPC {', '.join(map(str, IPC))}, {options.seeds} seeds",
        "settings": {name: getattr(options, name) for name in ("iterations", "epochs", "repeats", "seeds", "workers")},
        "cells": len(result.rows),
        "uninterrupted_seconds": uninterrupted,
        "kill": kill,
        "continued_seconds": continued,
        "equal": found[0] == found[1],
        "uninterrupted": found[0],
        "continued": found[1],
        "points": [
            {
                "method": point.method,
                "ipc": point.ipc,
                "bytes": point.bytes,
                "accuracy": point.accuracy.to_json(),
                "gain_over_random": point.gain.to_json() if point.gain else None,
            }
            for point in result.points
        ],
    }


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """The same command every time."""
    given = ("iterations", "epochs", "repeats", "seeds", "workers")
    settings = [f"--{name}={getattr(options, name)}" for name in given]
    line = [sys.executable, "-m", "benchmarks.sweep_resume", *settings, "--sweep", str(out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the images are tiny: threads would only wait for each other
    return subprocess.Popen(line, cwd=ROOT, env=one_thread)


def finished(options: argparse.Namespace, out: Path) -> float:
    """Run the sweep to its end; seconds."""
    begin = time.perf_counter()
    if start(options, out).wait():
        raise SystemExit("the sweep failed")
    return time.perf_counter() - begin


def kill_in_a_cell(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Start the sweep and kill it in the middle of a cell."""
    draw = random.Random(options.seed)
    cells, steps = draw.randrange(1, 4 * options.seeds), draw.randrange(5, max(6, options.iterations // 2))
    begin = time.perf_counter()
    process = start(options, out)
    while process.poll() is None and (len(lines(out)) < cells or steps_under_way(out) < steps):
        time.sleep(POLL)
    process.kill()
    seconds = time.perf_counter() - begin
    if process.wait() == 0:
        raise SystemExit("the sweep ended before it could be killed: give it more iterations")
    return {"seconds": seconds, "cells_done": len(lines(out)), "steps": steps_under_way(out)}


def lines(out: Path) -> list[dict[str, Any]]:
    """Whole lines of the sweep."""
    path = out / "results.jsonl"
    whole = (
        [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []
    )
    return [json.loads(line) for line in whole]


def steps_under_way(out: Path) -> int:
    """Steps of the cell that is furthest among those without a finished set."""
    logs = [cell / "run" / "metrics.jsonl" for cell in out.glob("cells/*") if not (cell / "dataset.json").exists()]
    return max((len(log.read_bytes().splitlines()) for log in logs if log.exists()), default=0)


def fingerprints(out: Path) -> dict[str, str]:
    """sha256 of each cell's set and accuracies, by key."""
    found = {}
    for line in lines(out):
        folder = out / "cells" / line["key"]
        content = json.dumps([line["accuracies"], line["baselines"], [_sha256(folder / name) for name in FILES]])
        found[line["key"]] = storage.sha256(content.encode())
    return dict(sorted(found.items()))


def _sha256(path: Path) -> str:
    return storage.sha256(path.read_bytes())


if __name__ == "__main__":
    main()
