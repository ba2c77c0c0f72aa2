"""Does a run that is killed again and again end with the same bytes as one left alone?

A digits run is started, killed with SIGKILL and started again by the same command, until it ends. Moments are drawn
from the seed: six in ten uniformly over the steps of the run, which are reached in order because every start goes on
from the last checkpoint, and the others uniformly over the seconds of starting up.
"""

import argparse
import os
import random
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.schema import RESULTS, ROOT, Kill
from benchmarks.writing import commit, write_result
from dsdistill.core import storage

FILES = ("images.safetensors", "labels.safetensors", "dataset.json")
POLL = 0.005


@dataclass(frozen=True)
class Moment:
    """When to kill: after ``step`` of the run was logged (0: any time after the start), ``seconds`` later."""

    aim: Literal["start-up", "work"]
    step: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "resume-digits-cpu.json")
    options, started = parser.parse_args(), commit()
    with tempfile.TemporaryDirectory() as folder:
        content = compare(options, Path(folder))
    write_result(options.out, content, seed=options.seed, started=started)
    print(f"written to {options.out}")
    if not content["equal"]:
        raise SystemExit("the resumed run differs from the uninterrupted one")


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, and the content of the result."""
    alone, killed = folder / "alone", folder / "killed"
    begin = time.perf_counter()
    start_up = first_step(run := start(options, alone), alone)
    if run.wait():
        raise SystemExit("the uninterrupted run failed")
    seconds = time.perf_counter() - begin
    print(f"uninterrupted: {seconds:.1f} s, first step after {start_up:.1f} s")
    pending = moments(options, start_up, (seconds - start_up) / options.iterations)
    kills = []
    for number, moment in enumerate(pending, 1):
        kill = kill_at(options, killed, moment)
        if kill is None:
            break
        kills.append(kill)
        print(f"kill {number}/{options.kills}: {kill.aim}, {kill.seconds:.2f} s, {kill.steps} steps logged", flush=True)
    if start(options, killed).wait():
        raise SystemExit("the resumed run failed")
    hashes = [{name: storage.sha256((run / name).read_bytes()) for name in FILES} for run in (alone, killed)]
    print("equal" if hashes[0] == hashes[1] else "DIFFERENT")
    return {
        "kind": "resume",
        "title": f"DM on digits, {options.iterations} steps, killed {len(kills)} times",
        "settings": {"iterations": options.iterations, "checkpoint_every": options.checkpoint_every, "threads": 1},
        "uninterrupted_seconds": seconds,
        "kills": [kill.model_dump() for kill in kills],
        "equal": hashes[0] == hashes[1],
        "uninterrupted": hashes[0],
        "resumed": hashes[1],
    }


def moments(options: argparse.Namespace, start_up: float, step: float) -> list[Moment]:
    """Kill moments in the order in which they can be reached."""
    draw = random.Random(options.seed)
    working = -(-6 * options.kills // 10)
    steps = sorted(draw.uniform(0, options.iterations) for _ in range(working))
    found = [Moment("work", max(1, int(at)), (at % 1) * step) for at in steps]
    for _ in range(options.kills - working):
        found.insert(draw.randrange(len(found) + 1), Moment("start-up", 0, draw.uniform(0, start_up)))
    return found


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """The same command every time."""
    line = [str(Path(sysconfig.get_path("scripts")) / "dsdistill"), "synthesize", "--data", "digits", "--method", "DM"]
    line += ["--method.ipc", "10", "--method.iterations", str(options.iterations), "--method.real_batch", "64"]
    line += ["--checkpoint_every", str(options.checkpoint_every), "--seed", str(options.seed), "--device", "cpu"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the images are tiny: threads would only wait for each other
    return subprocess.Popen([*line, "--out", str(out)], cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL)


def kill_at(options: argparse.Namespace, out: Path, moment: Moment) -> Kill | None:
    """Start the command and kill it at the moment; None if it ended before."""
    before, begin = set(log_lines(out)), time.perf_counter()
    process = start(options, out)
    while moment.step and process.poll() is None and not reached(moment.step, before, log_lines(out)):
        time.sleep(POLL)
    time.sleep(moment.seconds)
    process.kill()
    seconds = time.perf_counter() - begin
    if process.wait() == 0:
        return None
    lines = log_lines(out)
    return Kill(aim=moment.aim, seconds=seconds, after_first_step=reached(0, before, lines), steps=len(lines))


def reached(step: int, before: set[bytes], lines: list[bytes]) -> bool:
    """Whether the run has logged ``step`` steps, the last of them in the present process.

    A line holds the seconds since its process began, so lines of two processes differ.
    """
    return len(lines) >= step and bool(set(lines) - before)


def first_step(process: subprocess.Popen[bytes], out: Path) -> float:
    """Seconds until a fresh run has logged a step."""
    begin = time.perf_counter()
    while process.poll() is None and not log_lines(out):
        time.sleep(POLL)
    return time.perf_counter() - begin


def log_lines(out: Path) -> list[bytes]:
    """The whole lines of a run's log, one for each step."""
    log = out / "run" / "metrics.jsonl"
    return [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if log.exists() else []


if __name__ == "__main__":
    main()
