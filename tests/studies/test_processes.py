"""Studies over spawned processes, killed and interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from studies import actors
from studies.actors import PROTOCOL, Deadly, Slow, toy_source

from dsdistill import studies
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.methods import RandomReal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
SCRIPT = Path(actors.__file__)


def start(out, pause, epochs=3):
    """A study in two processes of a third one, which the test may kill."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    environment |= {"PAUSE": str(pause), "EPOCHS": str(epochs)}
    command = [sys.executable, str(SCRIPT), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_until(condition, process=None):
    for _ in range(4000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def figures(out):
    rows = studies.report(out).rows
    assert {row["device"]["threads"] for row in rows} == {1}
    return {row["key"]: (row["accuracies"], row["baselines"], row["bytes"], row["notes"]) for row in rows}


def steps(out):
    """Steps logged by cells that are not finished."""
    open_cells = [cell for cell in (out / "cells").glob("*") if not (cell / "dataset.json").exists()]
    logs = [cell / "run" / "metrics.jsonl" for cell in open_cells]
    return sum(len(log.read_bytes().splitlines()) for log in logs if log.exists())


def alive(out):
    """Whether some process still works on a cell."""
    for path in (out / "cells").glob("*/run/lock"):
        try:
            with filelock.FileLock(path, timeout=0):
                pass
        except filelock.Timeout:
            return True
    return False


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    actors.study(out, workers=1)
    found = figures(out)
    assert len(found) == 8
    return found


def test_a_study_killed_in_the_middle_of_a_cell_ends_the_same(uninterrupted, tmp_path, caplog):
    process = start(tmp_path, 0.3)  # long steps: on a busy machine too the kill comes before that job is through
    early = "cells/*/run/jobs/*/step_000000002"  # the first of three checkpoints, of which two are kept
    wait_until(lambda: (tmp_path / "results.jsonl").exists() and any(tmp_path.glob(early)), process)
    process.kill()
    process.communicate(timeout=60)
    results = tmp_path / "results.jsonl"
    assert 1 <= len(results.read_bytes().splitlines()) < 8
    wait_until(lambda: not alive(tmp_path))
    with results.open("ab") as file:  # as if killed while it wrote
        file.write(b'{"schema_version": 1, "key": "54f7')
    with caplog.at_level("INFO", "dsdistill"):
        actors.study(tmp_path, workers=1)
    assert "the last line was torn by a kill" in caplog.text
    assert "goes on after" in caplog.text
    assert len(results.read_bytes().splitlines()) == 8
    assert figures(tmp_path) == uninterrupted
    before = results.read_bytes()
    actors.study(tmp_path, workers=2)
    assert results.read_bytes() == before


def test_a_signal_lets_workers_save_their_step(uninterrupted, tmp_path):
    process = start(tmp_path, 0.1)
    wait_until(lambda: (tmp_path / "cells").exists() and steps(tmp_path) >= 3, process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM with " in said
    assert "of 8 cells done" in said
    assert not (tmp_path / "stop").exists()
    unfinished = [cell for cell in (tmp_path / "cells").glob("*") if not (cell / "dataset.json").exists()]
    assert unfinished
    for cell in unfinished:  # nothing of what was logged is lost
        logged = [json.loads(line) for line in (cell / "run" / "metrics.jsonl").read_text().splitlines()]
        job = cell / "run" / "jobs" / logged[-1]["job"].replace("/", "%2F")
        saved = {int(path.name[5:]) for path in job.glob("step_*")}
        assert (job / "part").exists() or logged[-1]["iteration"] + 1 in saved
    actors.study(tmp_path, workers=1)
    assert figures(tmp_path) == uninterrupted


@pytest.mark.slow  # in one process: test_grid
def test_a_signal_interrupts_scoring(tmp_path):
    process = start(tmp_path, 0, epochs=10**7)
    wait_until(lambda: len(list(tmp_path.glob("cells/*/dataset.json"))) == 2, process)
    time.sleep(1)  # by now both train networks
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "with 0 of 8 cells done" in said


def pooled(methods, out, data=None, **changes):
    usual = {"ipc": 1, "seeds": 1, "protocol": PROTOCOL, "repeats": 1, "workers": 2, "devices": ["cpu"]}
    return studies.grid(toy_source() if data is None else data, methods, out=out, **{**usual, **changes})


def test_a_cell_that_kills_its_process_is_tried_twice_and_the_rest_goes_on(tmp_path, monkeypatch):
    deaths, out = tmp_path / "deaths", tmp_path / "out"
    deaths.mkdir()
    # The first two are in flight together; what the slow one has done by then is saved before its process ends, too.
    monkeypatch.setenv("PAUSE", "0.3")
    monkeypatch.setenv("WAIT_FOR", str(deaths))
    methods = [Slow(one_job=True), Deadly(folder=str(deaths), beside=str(out)), RandomReal()]
    result = pooled(methods, out)
    assert [row["status"] for row in result.rows] == ["done", "failed", "done"]
    failed = result.failed[0]
    assert (failed["method"], failed["error"], failed["exit_code"]) == ("Deadly", "WorkerKilled", 1)
    assert "was killed" in (out / failed["traceback"]).read_text()
    assert len(list(deaths.iterdir())) == 2
    told = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    *earlier, last = [(line["status"], line.get("error")) for line in told if line["method"] == "Slow"]
    assert last[0] == "done"
    assert earlier in ([], [("failed", "WorkerKilled")])  # a busy machine may let it finish before the other's death
    assert len(pooled(methods, out, retry_failed=False).rows) == 3
    assert len(list(deaths.iterdir())) == 2


def test_what_cannot_be_sent_to_processes_is_refused(tmp_path):
    class Local(RandomReal):
        pass

    with pytest.raises(InvalidSetting, match="workers=1"):
        pooled(Local(), tmp_path)
    source = toy_source()
    closed = ImageSource("toy", source.classes, source.images, source.targets, open_test=lambda: toy_source())
    with pytest.raises(BadData, match="cannot be sent to another process"):
        pooled("RandomReal", tmp_path, data=closed)
