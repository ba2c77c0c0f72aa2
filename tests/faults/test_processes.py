"""Processes that are killed, asked to stop, or meet in one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from faults import nursery

from dsdistill.cli.main import main
from dsdistill.engine import checkpoint
from dsdistill.errors import OutputLocked
from dsdistill.methods import DM

SCRIPT = Path(nursery.__file__)
TESTS = SCRIPT.parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
LONG = "--data digits --method DM --method.ipc 1 --method.iterations 100000 --method.real_batch 4 --device cpu"


def in_the_nursery(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options)


def finished(process):
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_a_run_killed_before_anything_it_does_to_the_disk_ends_in_the_same_bytes(tmp_path):
    finished(in_the_nursery("operations", tmp_path, 13))


def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(tmp_path):
    finished(in_the_nursery("kills", tmp_path, 4, 0))


@pytest.mark.slow
def test_fifty_kills_at_random_and_one_before_every_operation(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    finished(in_the_nursery("kills", tmp_path / "a", 50, 1))
    finished(in_the_nursery("operations", tmp_path / "b", 1))


@pytest.fixture
def sleeper(tmp_path):
    """A process in the middle of a step that takes ten minutes."""
    process = in_the_nursery("sleep", tmp_path / "out")
    log = tmp_path / "out" / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_bytes().splitlines()) == 2, process)
    yield process
    process.kill()
    process.communicate()


def catches(process, signum):
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signum - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="signal masks are read from /proc")
def test_two_runs_in_one_folder_a_second_signal_that_ends_one_at_once_and_its_lock(sleeper, tmp_path, monkeypatch):
    method, out = nursery.Sleeper(ipc=1, iterations=3), tmp_path / "out"
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputLocked, match=f"in use by process {sleeper.pid} on ") as caught:
        nursery.run(out, method)
    assert caught.value.exit_code == 5
    assert sorted(out.rglob("*")) == before
    sleeper.send_signal(signal.SIGTERM)
    wait_until(lambda: not catches(sleeper, signal.SIGTERM), sleeper)  # the first was taken as a wish
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.wait(timeout=60) == -signal.SIGTERM
    assert checkpoint.read_newest(out / "run" / "jobs" / "class%2F0")[0] == 2
    assert json.loads((out / "run" / "lock.json").read_text())["pid"] == sleeper.pid  # stale, and no hindrance
    monkeypatch.setattr(nursery.time, "sleep", lambda seconds: None)
    for folder in (out, tmp_path / "whole"):
        nursery.run(folder, method)
    assert nursery.contents(out) == nursery.contents(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"pid": 1}', b"\xff", b"[" * 100_000, b"null"])
def test_a_lock_that_names_nobody(content, tmp_path):
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / "lock"):
        (tmp_path / "run" / "lock.json").write_bytes(content)
        with pytest.raises(OutputLocked, match="in use by another process"):
            nursery.run(tmp_path)
    nursery.run(tmp_path)
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["pid"] == os.getpid()


def test_a_command_that_was_asked_to_stop(tmp_path):
    command = [sys.executable, "-m", "dsdistill", "synthesize", *LONG.split(), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = tmp_path / "out" / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command again to continue" in errors
    assert "Traceback" not in errors


def test_the_exit_code_of_a_command_that_was_asked_to_end(tmp_path, monkeypatch, capsys):
    step = DM.step

    def asked(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(DM, "step", asked)
    assert main(["synthesize", *LONG.split(), "--out", str(tmp_path / "out")]) == 143
    assert "Run the same command again to continue" in capsys.readouterr().err
