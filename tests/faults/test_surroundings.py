"""Processes in poor surroundings: little memory, few files, closed streams, no home, another locale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import nursery

from dsdistill import SyntheticDataset
from dsdistill.cli.main import main
from dsdistill.core.device import is_out_of_memory, settle_allocator

SMALL = "synthesize --data digits --method DM --method.ipc 1 --method.iterations 2 --method.real_batch 4 --device cpu"
COMMAND = [*SMALL.split(), "--method.network.width", "4", "--out"]
TESTS = Path(nursery.__file__).parents[1]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm") / "out"
    assert main([*COMMAND, str(folder)]) == 0
    return nursery.contents(folder)


def shell(script, *arguments, **variables):
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **variables}
    command = ["sh", "-c", script, "-", sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment, timeout=150)


def test_no_home_no_temporary_folder_few_files_closed_streams_another_locale_and_hash_seed(calm, tmp_path):
    out = tmp_path / "caf\xe9 \U0001f408"
    surroundings = {
        "TMPDIR": "/nowhere/at/all",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONHASHSEED": "1",
    }
    script = 'ulimit -n 24; exec "$@" <&- >&- 2>&-'
    done = shell(script, "-m", "dsdistill", *COMMAND, out, **surroundings)
    assert done.returncode == 0
    assert nursery.contents(out) == calm


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_answer_that_does_not_fit_on_the_disk_is_no_success(tmp_path):
    done = shell('"$@" --json > /dev/full', "-m", "dsdistill", "methods")
    assert done.returncode == 5
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_memory_that_runs_out_for_real_halves_the_chunk():
    """The address space is limited so that one block of activations does not fit."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("address spaces are measured in /proc")
    done = shell('"$@"', nursery.__file__, "memory", 40, 128)
    if done.returncode == 0 and not done.stdout:
        pytest.skip("the allocator found room elsewhere")
    assert done.returncode == 0, done.stderr
    assert b"memory ran out at iteration 0: from there on 64 images passed" in done.stdout


def test_too_little_memory_for_a_preference_is_no_fault(monkeypatch):
    def full(*_, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(torch, "empty", full)
    settle_allocator(torch.device("cpu"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN's words


def test_a_set_that_memory_cannot_hold_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    assert main(["synthesize", "--data", "digits", "--method", "RandomReal", "--out", str(tmp_path)]) == 0

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(SyntheticDataset, "_manifest", full)
    assert main(["inspect", str(tmp_path)]) == 5
    assert "out of memory" in capsys.readouterr().err
