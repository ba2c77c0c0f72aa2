"""Experts whose training is killed; as a script, that training, forked many times (see `nursery`).

::

    test_experts.py OUT EVERY     kill it before every EVERY-th thing it does to the disk, and train again
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults.nursery import before_each_operation, ended, forked, two_classes
from safetensors import safe_open

from dsdistill import train_experts
from dsdistill.experts import Experts, PlainTraining, growth, shards
from dsdistill.networks import NetworkSpec

EXPERTS = Experts(count=2, training=PlainTraining(epochs=3, batch_size=4, momentum=0.9))
TESTS = Path(__file__).parents[1]


def train(store: Path) -> None:
    train_experts(two_classes(), EXPERTS, NetworkSpec("mlp", width=2), store=store, device="cpu")


def contents(store: Path) -> dict[str, dict[str, str]]:
    """What is there, by name. The order of a file's metadata is chance; its seal is that of all else."""
    found = {}
    for path in filter(Path.is_file, store.rglob("*")):
        about = {}
        if path.suffix == ".safetensors":
            shards.check(path)
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
        found[str(path.relative_to(store))] = about
    return found


def train_and_die(store: Path, last: int) -> None:
    before_each_operation(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == last else None)
    train(store)


@pytest.mark.parametrize("every", [15, *(pytest.param(every, marks=pytest.mark.slow) for every in (5, 1))])
def test_experts_killed_before_anything_they_do_to_the_disk_are_the_same_in_the_end(every, tmp_path):
    command = [sys.executable, __file__, str(tmp_path), str(every)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10, "it does less to the disk than is known"


if __name__ == "__main__":
    torch.set_num_threads(1)
    growth._KEEP_SECONDS = -1.0  # an expert is kept after each epoch, so that it may be killed half-grown
    out, every = Path(sys.argv[1]), int(sys.argv[2])
    train(out / "whole")
    expected = contents(out / "whole")
    number, killed = 0, True
    while killed:
        store = out / str(number)
        killed = ended(forked(lambda: train_and_die(store, number))) == -signal.SIGKILL  # noqa: B023
        if ended(forked(lambda: train(store))) != 0:  # noqa: B023
            sys.exit(f"killed before operation {number}: the training does not go on")
        if contents(store) != expected:
            sys.exit(f"killed before operation {number}: {contents(store)} is there, not {expected}")
        number += every
    print(number)
