"""Grids in this process and over executors that the caller brings."""

import json
import logging
import os
import re
import signal
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from studies.actors import Fragile, Slow, toy_source
from toys import Wander

from dsdistill import studies
from dsdistill.core import storage
from dsdistill.errors import BadData, DeviceUnavailable, InvalidSetting, OutputConflict, OutputLocked, UnknownName
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.studies import worker
from dsdistill.studies.cells import DataReference
from dsdistill.studies.folder import StudyFolder
from dsdistill.studies.study import _integers
from dsdistill.synthetic import SyntheticDataset

TINY = DM(iterations=2, real_batch=4, network=NetworkSpec(width=8, depth=1))


def lines(out):
    return [json.loads(line) for line in (out / "study" / "results.jsonl").read_text().splitlines()]


def figures(result):
    """What must not depend on how a study ran."""
    return {row["key"]: (row["accuracies"], row["baselines"], row["bytes"]) for row in result.rows}


def test_a_line_tells_everything_and_a_second_call_does_nothing(grid, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    result = grid([TINY, "RandomReal"])
    assert len(result.done) == len(lines(tmp_path)) == 8
    row = result.rows[0]
    assert (row["method"], row["ipc"], row["seed"], row["status"]) == ("DM", 1, 0, "done")
    assert row["settings"]["iterations"] == 2
    assert row["protocol"] == "dc (changed: epochs, network)"
    assert len(row["accuracies"]) == len(row["baselines"]["random"]) == len(row["gain"]) == 2
    assert row["gain"][1] == row["accuracies"][1] - row["baselines"]["random"][1]
    assert row["bytes"] == {"images": 3 * 192 * 4, "labels": 12, "learned": 0, "total": 2316, "random": 2316}
    assert min(row["seconds"].values()) > 0
    assert row["peak_memory_bytes"] > 2**20
    assert row["device"]["threads"] == 1
    assert row["device"]["name"] == "cpu"
    assert row["versions"]["torch"] == torch.__version__.split("+")[0]
    assert row["notes"] == []
    synthetic = SyntheticDataset.load(tmp_path / "study" / "cells" / row["key"])
    assert (synthetic.ipc, synthetic.recipe.seed) == (1, 0)

    monkeypatch.setattr(worker, "synthesize", None)  # calling it would fail
    again = grid([TINY, "RandomReal"])
    assert again.to_json() == result.to_json()
    assert len(lines(tmp_path)) == 8


def test_only_new_cells_are_made(grid, tmp_path, monkeypatch):
    grid()
    calls, synthesize = [], worker.synthesize

    def counted(method, *args, **kwargs):
        calls.append((method.ipc, kwargs["seed"]))
        return synthesize(method, *args, **kwargs)

    monkeypatch.setattr(worker, "synthesize", counted)
    result = grid(ipc=(2, 3), seeds=3)
    assert sorted(calls) == [(2, 2), (3, 0), (3, 1), (3, 2)]
    assert [(row["ipc"], row["seed"]) for row in result.rows] == [(2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2)]
    assert len(studies.report(tmp_path / "study").rows) == 8


def test_seeds_are_independent_runs_and_methods_paired(grid):
    rows = grid([TINY, "RandomReal"], ipc=1, seeds=[4, 9]).rows
    random = {(row["method"], row["seed"]): row["baselines"]["random"] for row in rows}
    assert random["DM", 4] == random["RandomReal", 4]
    assert random["DM", 4] != random["DM", 9]


def test_the_whole_set_is_scored_once(grid):
    result = grid(baselines=("random", "whole"), whole_epochs=2)
    assert [row["whole"] for row in result.rows] == [False] * 4 + [True]
    ((whole, epochs),) = result.whole.values()
    assert (whole.n, epochs) == (2, 2)
    assert len(result.points) == 2
    assert "whole training set, 2 epochs" in str(result)


def test_a_failure_is_recorded_and_the_rest_goes_on(grid, tmp_path, caplog):
    cure = tmp_path / "cure"
    methods = [Fragile(cure=str(cure)), RandomReal()]
    result = grid(methods, seeds=1)
    assert [row["status"] for row in result.rows] == ["failed", "done", "failed", "done"]
    failed = result.failed[0]
    assert (failed["error"], failed["exit_code"]) == ("ValueError", 1)
    assert failed["message"] == "no cure 💊 for ipc 1"
    trace = (tmp_path / "study" / failed["traceback"]).read_text()
    assert "Traceback" in trace
    assert "actors.py" in trace
    assert "2 cells failed" in str(result)
    assert "failed: ValueError: no cure" in caplog.text

    grid(methods, seeds=1, retry_failed=False)
    assert len(lines(tmp_path)) == 4
    grid(methods, seeds=1)
    assert len(lines(tmp_path)) == 6  # tried again, in vain
    cure.touch()
    fixed = grid(methods, seeds=1)
    assert [row["status"] for row in fixed.rows] == ["done"] * 4
    assert not (tmp_path / "study" / failed["traceback"]).exists()
    assert len(lines(tmp_path)) == 8


def test_errors_of_ours_keep_their_exit_code(grid):
    (row,) = grid(Wander(bad_at=1), ipc=1, seeds=1).rows
    assert (row["error"], row["exit_code"]) == ("Diverged", 4)


def test_a_method_that_wants_to_exit_ends_its_cell_only(grid, monkeypatch):
    monkeypatch.setattr(RandomReal, "start", lambda *_: exit(3))
    assert [row["error"] for row in grid().rows] == ["SystemExit"] * 4


def test_images_that_changed_under_a_study_are_noticed(grid, monkeypatch):
    monkeypatch.setattr(worker.SOURCES, "get", lambda data: toy_source(seed=9))
    assert {row["message"] for row in grid().failed} == {
        "'toy' holds other images than when the study began; run the study again"
    }


def test_another_grid_may_share_the_folder_and_is_logged(grid, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dsdistill"):
        grid()
        assert "another grid" not in caplog.text
        grid(ipc=(1, 3))
    assert "holds another grid, which stays" in caplog.text
    assert "ipc: [1, 2] -> [1, 3]" in caplog.text
    assert storage.read_manifest(tmp_path / "study" / "study.json")["ipc"] == [1, 3]
    (tmp_path / "study" / "study.json").write_text("{}")
    grid()
    assert "it is written anew" in caplog.text


def test_a_folder_has_one_user_at_a_time(grid, tmp_path):
    with (
        StudyFolder(tmp_path / "study"),
        pytest.raises(OutputLocked, match=f"in use by process {os.getpid()} on "),
    ):
        grid()
    assert len(grid().done) == 4


def test_a_folder_of_something_else_is_refused(grid, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").touch()
    with pytest.raises(OutputConflict, match=r"no study wrote \('thesis.tex'\)"):
        grid()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["RandmReal"]}, UnknownName, "did you mean 'RandomReal'"),
        ({"ipc": (1, 13)}, BadData, "fewer than ipc=13"),
        ({"ipc": 0}, InvalidSetting, "ipc = 0"),
        ({"ipc": ()}, InvalidSetting, "at least one"),
        ({"ipc": (True,)}, InvalidSetting, "ipc = True"),
        ({"seeds": 0}, InvalidSetting, "seeds = 0"),
        ({"seeds": ["1"]}, InvalidSetting, "seeds = '1'"),
        ({"protocol": "dsaa"}, UnknownName, "did you mean 'dsa'"),
        ({"protocol": "cvdd"}, InvalidSetting, "protocol = 'cvdd' .*unless teachers are named"),
        ({"baselines": ["randm"]}, UnknownName, "did you mean 'random'"),
        ({"repeats": 0}, InvalidSetting, r"Scoring\.repeats = 0"),
        ({"workers": 0}, InvalidSetting, "workers = 0"),
        ({"devices": ["cuda:99"]}, DeviceUnavailable, "cuda:99"),
        ({"devices": []}, InvalidSetting, "at least one device"),
        ({"checkpoint_every": 0}, InvalidSetting, "checkpoint_every = 0"),
        ({"load": {"zca": True}}, InvalidSetting, "this is a source"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_any_file_is_made(grid, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        grid(**changes)
    assert not (tmp_path / "study").exists()


# -- stopping ----------------------------------------------------------------------------------------------------


class Interrupting(Executor):
    """Sends this process a signal before it works on a task, and works at once."""

    def __init__(self, after, signum):
        self.left, self.signum = after, signum

    def submit(self, function, /, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            signal.raise_signal(self.signum)
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_cells_ends_the_study(grid, signum, code):
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(studies.StudyStopped, match="with 1 of 4 cells done") as caught:
        grid(executor=Interrupting(1, signum), workers=1)
    assert caught.value.exit_code == code
    assert (caught.value.done, caught.value.total) == (1, 4)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(grid().done) == 4


def test_a_signal_during_a_synthesis_saves_the_step_in_progress(grid, tmp_path, monkeypatch):
    step = Slow.step

    def stopping(self, run, state, iteration):
        if iteration == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, run, state, iteration)

    method = Slow(one_job=True)
    reference = figures(grid(method, ipc=1, out=tmp_path / "reference"))
    with monkeypatch.context() as patch:
        patch.setattr(Slow, "step", stopping)
        with pytest.raises(studies.StudyStopped, match="0 of 2 cells done"):
            grid(method, ipc=1)
    assert [path.name for path in (tmp_path / "study").rglob("step_*")] == ["step_000000004"]
    iterations = []
    monkeypatch.setattr(Slow, "step", lambda *a: iterations.append(a[-1]) or step(*a))
    assert figures(grid(method, ipc=1)) == reference
    assert iterations == [4, 5, *range(6)]


def test_a_signal_during_scoring_gives_it_up_and_keeps_the_set(grid, tmp_path, monkeypatch):
    def stopping(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the scoring went on")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "evaluate", stopping)
        with pytest.raises(studies.StudyStopped, match="0 of 4 cells done"):
            grid()
    assert len(list((tmp_path / "study" / "cells").glob("*/dataset.json"))) == 1
    assert not (tmp_path / "study" / "results.jsonl").exists()
    assert len(grid().done) == 4


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_cells_queued_by_an_executor_are_cancelled(grid):
    begun, futures = [], []

    class Queueing(ThreadPoolExecutor):
        def submit(self, function, task):
            def work():
                begun.append(task)
                wait_until(lambda: len(futures) == 4)
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until(lambda: all(future.cancelled() for future in futures[1:]))
                return function(task)

            futures.append(super().submit(work))
            return futures[-1]

    with Queueing(1) as threads, pytest.raises(studies.StudyStopped, match="0 of 4"):
        grid(executor=threads, workers=4)
    assert len(begun) == 1


# -- executors ---------------------------------------------------------------------------------------------------


class SubmitOnly:
    """The least an executor can be."""

    def __init__(self):
        self.tasks = []

    def submit(self, function, task):
        self.tasks.append(task)
        future = Future()
        try:
            future.set_result(function(task))
        except BaseException as error:
            future.set_exception(error)
        return future


def test_any_executor_gives_the_same_results(grid, tmp_path):
    reference = figures(grid([TINY, "RandomReal"]))
    minimal = SubmitOnly()
    assert figures(grid([TINY, "RandomReal"], out=tmp_path / "minimal", executor=minimal)) == reference
    assert len(minimal.tasks) == 8
    with ThreadPoolExecutor(2) as threads:
        before = torch.get_rng_state()
        found = figures(grid([TINY, "RandomReal"], out=tmp_path / "threads", executor=threads, workers=None))
        assert torch.equal(torch.get_rng_state(), before)
    assert found == reference


def test_devices_are_dealt_out_in_turn(grid, monkeypatch):
    minimal = SubmitOnly()
    monkeypatch.setattr("dsdistill.studies.study.resolve_device", lambda name: torch.device(name))
    grid(executor=minimal, devices=["cuda:0", "cuda:1"], workers=2)
    assert [task.device for task in minimal.tasks] == ["cuda:0", "cuda:1"] * 2


def test_no_more_cells_than_workers_are_under_way(grid):
    class Counting(SubmitOnly):
        under_way = most = 0

        def submit(self, function, task):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            future = super().submit(function, task)
            later = Future()
            threads.submit(lambda: (self.end(), later.set_result(future.result())))
            return later

        def end(self):
            self.under_way -= 1

    with ThreadPoolExecutor(1) as threads:
        counting = Counting()
        grid(executor=counting, workers=2, seeds=4)
    assert 1 <= counting.most <= 2


def test_a_broken_executor_is_told_and_nothing_is_lost(grid, tmp_path):
    class Breaking(SubmitOnly):
        def submit(self, function, task):
            if len(self.tasks) == 2:
                raise BrokenProcessPool("gone")
            return super().submit(function, task)

    with pytest.raises(BrokenProcessPool):
        grid(executor=Breaking(), workers=1)
    assert [line["status"] for line in lines(tmp_path)] == ["done", "done"]
    assert len(grid().done) == 4


def test_a_task_lost_by_the_executor_is_a_failure(grid):
    class Losing(SubmitOnly):
        def submit(self, function, task):
            future = super().submit(function, task)
            if len(self.tasks) == 2:
                future = Future()
                future.set_exception(BrokenProcessPool("gone"))
            if len(self.tasks) == 1:
                future = Future()
                future.set_exception(TypeError("cannot pickle"))
            return future

    with pytest.raises(BrokenProcessPool, match="gone"):
        grid(executor=Losing(), workers=2)
    assert [row["error"] for row in grid(executor=SubmitOnly(), retry_failed=False).failed] == [
        "TypeError",
        "WorkerKilled",
    ]


def test_tasks_carry_a_reference_and_no_tensors(grid):
    import pickle

    minimal = SubmitOnly()
    grid("RandomReal", data="digits", executor=minimal, ipc=1, seeds=1)
    assert len(pickle.dumps(minimal.tasks[0])) < 5000
    assert worker.SOURCES._opened == {}  # nothing is kept after the study


def test_data_by_name_are_opened_once(grid, monkeypatch):
    opened = []
    monkeypatch.setattr(DataReference, "open", lambda reference: opened.append(reference.data) or toy_source())
    grid(data="anything")
    assert opened == ["anything"]


def test_progress_is_a_line_for_each_cell_where_there_is_no_terminal(grid, caplog):
    with caplog.at_level(logging.INFO, "dsdistill"):
        result = grid(progress=True)
    told = [record.message for record in caplog.records if re.search(r"\(\d/4\)$", record.message)]
    assert len(told) == 4
    row = result.rows[-1]
    mean = 100 * sum(row["accuracies"]) / 2
    assert told[-1] == f"{row['key'][:12]} RandomReal ipc 2 seed 1: {mean:.2f} % (4/4)"


def test_integers_of_any_library_are_whole_numbers():
    assert _integers("ipc", np.int64(3), least=1) == [3]
    assert _integers("seeds", np.int32(2), counted=True) == [0, 1]
    assert _integers("seeds", np.array([5, 0, 5])) == [5, 0]
    for wrong in (True, 1.5, [1.5], [True], []):
        with pytest.raises(InvalidSetting):
            _integers("ipc", wrong, least=1)
