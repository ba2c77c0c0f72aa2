import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from toys import Wander

from dsdistill import SyntheticDataset, estimate, synthesize
from dsdistill.engine import Job, observe
from dsdistill.errors import (
    BadArtifact,
    BadData,
    DeviceUnavailable,
    Diverged,
    InvalidSetting,
    OutputConflict,
    OutputLocked,
    Stopped,
)
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.testing import check_synthesizer

FILES = ("images.safetensors", "labels.safetensors", "dataset.json", "README.md", "grid.png")
TOYS = Path(__file__).parents[1] / "toys.py"


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def interrupt_after(iteration):
    def callback(event):
        if event.iteration == iteration:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("method", [Wander(ipc=2), Wander(ipc=1, one_job=True)], ids=repr)
def test_contract(method, source):
    check_synthesizer(method, source)


def test_a_set_in_memory_equals_the_one_on_disk(source, tmp_path):
    made = synthesize(Wander(), source)
    saved = synthesize(Wander(), source, out=tmp_path / "a")
    loaded = SyntheticDataset.load(tmp_path / "a")
    for other in (saved, loaded):
        assert torch.equal(made.tensors()[0], other.tensors()[0])
    assert made.targets == loaded.targets == [0] * 10 + [1] * 10 + [2] * 10
    assert loaded.recipe == saved.recipe
    assert loaded.recipe.method["type"] == "Wander"


def test_the_same_command_on_a_finished_run_changes_nothing(source, method, tmp_path):
    synthesize(method, source, out=tmp_path)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in FILES}
    again = synthesize(method, source, out=tmp_path)
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in FILES}
    assert again.ipc == 2
    assert not (tmp_path / "run" / "jobs").exists()


@pytest.mark.parametrize("stops", [[0], [3], [7], [2, 2, 5], [1, 4, 6]])
def test_a_resumed_run_ends_in_the_same_bytes(stops, source, method, tmp_path):
    whole = synthesize(method, source, out=tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            synthesize(method, source, out=tmp_path / "cut", checkpoint_every=2, callback=interrupt_after(stop))
        torch.rand(11)
    resumed = synthesize(method, source, out=tmp_path / "cut", checkpoint_every=2)
    assert torch.equal(whole.tensors()[0], resumed.tensors()[0])
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_the_log_has_each_step_once_after_a_resume(source, method, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=tmp_path, checkpoint_every=3, callback=interrupt_after(4))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"job": "all", "itera')  # as a kill leaves it
    synthesize(method, source, out=tmp_path, checkpoint_every=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(8))
    assert all(math.isfinite(line["loss"]) and line["job"] == "all" for line in lines)


def test_a_run_that_no_terminal_shows_says_how_far_it_is(source, method, monkeypatch, caplog):
    monkeypatch.setattr(observe, "TELL_SECONDS", 0.0)
    caplog.set_level("INFO", "dsdistill")
    synthesize(method, source)
    told = [record.getMessage() for record in caplog.records if ": step " in record.getMessage()]
    assert [line.split(",")[0] for line in told] == [f"DM: step {step} of 8" for step in range(1, 9)]
    caplog.clear()
    synthesize(method, source, progress=False)
    assert not any(": step " in record.getMessage() for record in caplog.records)


def test_only_the_last_checkpoints_are_kept(source, method, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=tmp_path, checkpoint_every=1, keep=2, callback=interrupt_after(6))
    assert [path.name for path in sorted((tmp_path / "run/jobs/all").iterdir())] == ["step_000000005", "step_000000006"]


def interrupted(source, method, folder):
    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=folder, checkpoint_every=2, callback=interrupt_after(6))
    return sorted((folder / "run/jobs/all").iterdir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no manifest", "foreign manifest"])
def test_a_damaged_checkpoint_gives_way_to_an_older_one(damage, source, method, tmp_path, caplog):
    whole = synthesize(method, source)
    _, newest = interrupted(source, method, tmp_path)
    spoil(newest, damage)
    resumed = synthesize(method, source, out=tmp_path)
    assert torch.equal(whole.tensors()[0], resumed.tensors()[0])
    assert "checkpoint step_000000006 is discarded" in caplog.text


def spoil(step, damage):
    tensors, meta = step / "state.safetensors", step / "state.json"
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[-5] ^= 64
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "no manifest":
        meta.unlink()
    else:
        meta.write_text(json.dumps({"schema_version": 1, "iteration": 99, "state": {"value": None}}))


def test_no_usable_checkpoint_is_an_error_that_names_the_mend(source, method, tmp_path):
    for step in interrupted(source, method, tmp_path):
        spoil(step, "truncate")
    with pytest.raises(BadArtifact, match=r"no checkpoint is usable.*--overwrite"):
        synthesize(method, source, out=tmp_path)
    assert synthesize(method, source, out=tmp_path, overwrite=True).ipc == 2


def test_a_half_written_checkpoint_is_ignored(source, method, tmp_path):
    whole = synthesize(method, source)
    *_, newest = interrupted(source, method, tmp_path)
    newest.rename(newest.with_name(newest.name + ".tmp"))
    (newest.with_name(newest.name + ".tmp") / "state.json").unlink()
    assert torch.equal(whole.tensors()[0], synthesize(method, source, out=tmp_path).tensors()[0])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda method, source: (replace(method, ipc=1), source, 0), r"method\.ipc: 2 -> 1"),
        (lambda method, source: (RandomReal(), source, 0), r"There: DM on 'toy'; asked for: RandomReal on 'toy'"),
        (lambda method, source: (method, source, 1), r"seed: 0 -> 1"),
        (lambda method, source: (method, source.subset(range(1, 36)), 0), r"source\.fingerprint"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_another_run_is_refused_field_by_field(change, difference, finished, source, method, tmp_path):
    if finished:
        synthesize(method, source, out=tmp_path)
    else:
        interrupted(source, method, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    other, data, seed = change(method, source)
    with pytest.raises(OutputConflict, match=difference):
        synthesize(other, data, seed=seed, out=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    synthesize(other, data, seed=seed, out=tmp_path, overwrite=True)
    assert SyntheticDataset.load(tmp_path).recipe.seed == seed


def test_overwrite_touches_only_what_a_run_wrote(source, method, tmp_path):
    synthesize(method, source, out=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    synthesize(method, source, seed=1, out=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_foreign_files_are_never_mixed_with_a_run(source, method, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputConflict, match=r"'thesis\.tex'"):
        synthesize(method, source, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_outputs_are_refused_before_any_work(source, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputConflict):
            synthesize(Wander(bad_at=0), source, out=out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused(source, method, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputConflict, match="cannot be written"):
        synthesize(method, source, out=tmp_path)


def test_a_folder_in_use_names_its_holder(source, method, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def hold(event):
        entered.set()
        leave.wait(30)

    worker = threading.Thread(target=lambda: synthesize(method, source, out=tmp_path, callback=hold))
    worker.start()
    assert entered.wait(30)
    try:
        with pytest.raises(OutputLocked, match=f"in use by process {os.getpid()} on "):
            synthesize(method, source, out=tmp_path)
    finally:
        leave.set()
        worker.join()


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_state(source, tmp_path):
    calm = synthesize(Wander(iterations=3, one_job=True), source)
    with pytest.raises(Diverged, match=r"Wander, job 'all', iteration 3: loss is not finite.*'loss': 2\.0") as caught:
        synthesize(Wander(bad_at=3, one_job=True), source, out=tmp_path)
    assert caught.value.iteration == 3
    kept = SyntheticDataset.load(caught.value.saved)
    assert torch.equal(kept.tensors()[0], calm.tensors()[0])
    assert "NOT FINISHED: diverged at iteration 3" in kept.recipe.notes[0]
    assert not (tmp_path / "dataset.json").exists()


def test_a_nan_in_the_images_is_noticed_even_if_the_loss_is_finite(source):
    with pytest.raises(Diverged, match="iteration 2: the updated state is not finite") as caught:
        synthesize(Wander(poison_at=2), source)
    assert caught.value.saved is None
    assert bool(torch.isfinite(caught.value.last_good.tensors()[0]).all())


def test_a_learned_step_size_that_diverges_is_not_blamed_on_the_images(source):
    class Astray(Wander):
        def step(self, run, state, iteration):
            return {**super().step(run, state, iteration), "lr": torch.tensor(torch.inf)}

    with pytest.raises(Diverged, match=r"lr is not finite\..* Lower lr_student or lr_lr\.$"):
        synthesize(Astray(), source)


def test_dm_with_an_absurd_step_size_diverges_cleanly(source, method):
    with pytest.raises(Diverged, match="Lower the learning rate"):
        synthesize(replace(method, lr_images=1e38, iterations=50, network=NetworkSpec(width=8, norm="none")), source)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:99"}, DeviceUnavailable, "cuda:99"),
        ({"device": "tpu"}, DeviceUnavailable, "no such kind of device"),
        ({"device": "meta"}, DeviceUnavailable, "only cpu, cuda and mps"),
        ({"checkpoint_every": 0}, InvalidSetting, "checkpoint_every = 0"),
        ({"chunk": -1}, InvalidSetting, "chunk = -1"),
        ({"seed": "0"}, InvalidSetting, "seed = '0'"),
    ],
)
def test_bad_arguments_are_refused_before_any_file_is_made(options, error, message, source, method, tmp_path):
    with pytest.raises(error, match=message):
        synthesize(method, source, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_cuda_asked_for_and_absent(source, method):
    with pytest.raises(DeviceUnavailable, match="offers 0 CUDA devices"):
        synthesize(method, source, device="cuda")


def test_a_small_class_is_refused_capped_or_repeated(source):
    short = source.subset([*range(3), *range(12, 36)])
    with pytest.raises(
        BadData, match=r"1 classes of 'toy' have fewer than ipc=5 images: 'red' \(3\); .*on_small_class"
    ):
        synthesize(RandomReal(ipc=5), short)
    capped = synthesize(RandomReal(ipc=5, on_small_class="cap"), short)
    assert capped.counts == (3, 5, 5)
    doubled = synthesize(RandomReal(ipc=5, on_small_class="duplicate"), short)
    assert doubled.counts == (5, 5, 5)
    red = doubled.tensors()[0][:5]
    assert torch.equal(red[:2], red[3:])
    assert len(torch.unique(red, dim=0)) == 3
    assert synthesize(DM(ipc=5, iterations=2, on_small_class="cap"), short).counts == (3, 5, 5)


def test_chunking_changes_nothing_but_rounding(source, method):
    reference = synthesize(method, source, chunk=1000).tensors()[0]
    for chunk in (1, 5):
        torch.testing.assert_close(
            synthesize(method, source, chunk=chunk).tensors()[0], reference, rtol=1e-4, atol=1e-4
        )


@dataclass
class Forks:
    """Makes the runs of `toys` one after another, each in a process that may be killed."""

    parent: subprocess.Popen
    errors: Path

    def start(self, out, pause=0.0):
        """The id of a new process, which waits so many seconds after each step."""
        self.parent.stdin.write(f"{pause} {out}\n")
        self.parent.stdin.flush()
        return self.hear("process")

    def hear(self, kind, least=-signal.NSIG):
        """The next number of a kind from ``least`` on."""
        for line in iter(self.parent.stdout.readline, ""):
            said, number = line.split()
            if said == kind and int(number) >= least:
                return int(number)
            assert said != "ended", self.errors.read_text()
        raise AssertionError(self.errors.read_text())


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    errors = tmp_path_factory.mktemp("forks") / "errors"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with errors.open("w") as file, subprocess.Popen([sys.executable, str(TOYS)], stderr=file, **pipes) as parent:
        yield Forks(parent, errors)


@pytest.fixture(scope="module")
def uninterrupted(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    forks.start(folder)
    assert forks.hear("ended") == 0, forks.errors.read_text()
    return contents(folder)


def test_killed_runs_end_in_the_same_bytes(forks, uninterrupted, tmp_path):
    for step in (1, 25, 44):
        process = forks.start(tmp_path / "out", 0.005)
        forks.hear("step", step)
        os.kill(process, signal.SIGKILL)
        assert forks.hear("ended") == -signal.SIGKILL
    forks.start(tmp_path / "out")
    assert forks.hear("ended") == 0, forks.errors.read_text()
    assert contents(tmp_path / "out") == uninterrupted
    assert not list((tmp_path / "out").glob(".tmp-*"))


# Ctrl-C is tried on whole commands in tests/faults/test_processes.py.
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_and_saves(signum, forks, uninterrupted, tmp_path):
    said_before = len(forks.errors.read_text())
    process = forks.start(tmp_path / "out", 0.02)
    forks.hear("step", 4)
    os.kill(process, signum)
    assert forks.hear("ended") == 1
    assert "Stopped: stopped by " + signal.Signals(signum).name in forks.errors.read_text()[said_before:]
    steps = sorted((tmp_path / "out/run/jobs/all").glob("step_*"))
    assert int(steps[-1].name[-9:]) >= 5
    forks.start(tmp_path / "out")
    assert forks.hear("ended") == 0, forks.errors.read_text()
    assert contents(tmp_path / "out") == uninterrupted


def test_signal_handlers_are_given_back(source, method, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    synthesize(method, source, out=tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stopped_knows_its_exit_code(source, tmp_path):
    def stop(event):
        if event.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="Run the same command again") as caught:
        synthesize(Wander(one_job=True), source, out=tmp_path, callback=stop)
    assert caught.value.exit_code == 143
    assert caught.value.iteration in (3, 4)


def test_the_meaning_of_a_mirror_is_part_of_the_run(source, method, tmp_path):
    synthesize(method, source, out=tmp_path)
    with pytest.raises(OutputConflict, match=r"source\.mirror_safe: True -> False"):
        synthesize(method, source.with_mirror_safe(False), out=tmp_path)


def test_other_conditions_may_finish_a_run_and_are_noted(source, method, tmp_path, caplog):
    interrupted(source, method, tmp_path)
    made = synthesize(method, source, out=tmp_path, chunk=1)
    assert "continued under other conditions" in made.recipe.notes[0]
    assert "chunk: " in caplog.text
    assert SyntheticDataset.load(tmp_path).recipe.notes == made.recipe.notes
    again = synthesize(method, source, out=tmp_path, chunk=3)  # finished: nothing is made anew
    assert again.recipe == made.recipe


def test_overwrite_spares_what_no_run_wrote(source, method, tmp_path):
    for name in ("dataset.json", "README.md"):
        (tmp_path / name).write_text('{"mine": true}')
    with pytest.raises(OutputConflict, match=r"holds a dataset\.json of something else"):
        synthesize(method, source, out=tmp_path, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "dataset.json": '{"mine": true}',
        "README.md": '{"mine": true}',
    }


def test_a_network_that_does_not_fit_leaves_no_trace(source, method, tmp_path):
    with pytest.raises(InvalidSetting, match="use depth 3 or less"):
        synthesize(replace(method, network=NetworkSpec(depth=9)), source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_signal_stops_methods_without_steps_between_jobs(source, tmp_path, monkeypatch):
    def stop(jobs):
        os.kill(os.getpid(), signal.SIGTERM)
        return jobs

    monkeypatch.setattr(Wander, "jobs", lambda self, run: stop([Job("a", run.classes)]))
    with pytest.raises(Stopped, match="after 0 iterations"):
        synthesize(Wander(iterations=0, ipc=1), source, out=tmp_path)
    assert not (tmp_path / "dataset.json").exists()


def test_finished_jobs_are_kept_and_not_run_again(source, tmp_path):
    whole = synthesize(Wander(), source, out=tmp_path / "whole")
    started = []

    def stop_in_the_second(event):
        started.append(event.job)
        if event.job == "class/1" and event.iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(Wander(), source, out=tmp_path / "cut", checkpoint_every=2, callback=stop_in_the_second)
    first = tmp_path / "cut/run/jobs/class%2F0"
    assert [path.name for path in first.iterdir()] == ["part"]
    started.clear()
    resumed = synthesize(Wander(), source, out=tmp_path / "cut", callback=lambda event: started.append(event.job))
    assert started[0] == "class/1"
    assert torch.equal(whole.tensors()[0], resumed.tensors()[0])
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


@dataclass(frozen=True, kw_only=True)
class Noted(Wander):
    """Adds a note and a parent to each part's recipe."""

    def finish(self, run, state):
        made = super().finish(run, state)
        recipe = replace(made.recipe, notes=("redrawn: 0",), parents=({"job": run.rng.job}, {"teacher": "x"}))
        return replace(made, recipe=recipe)


def test_what_a_method_notes_is_kept_once(source):
    recipe = synthesize(Noted(), source).recipe
    assert recipe.notes == ("redrawn: 0",)
    assert recipe.parents == ({"job": "class/0"}, {"teacher": "x"}, {"job": "class/1"}, {"job": "class/2"})
    assert recipe.method["type"] == "Noted"


def test_conditions_that_change_after_the_last_job_are_noted_too(source, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticDataset, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            synthesize(Noted(), source, out=tmp_path)
    recipe = synthesize(Noted(), source, out=tmp_path, chunk=1).recipe
    assert ["continued under other conditions" in note for note in recipe.notes] == [True, False]
    assert recipe.notes[1] == "redrawn: 0"
    assert len(recipe.parents) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("DM", None), r"method = 'DM'.*dd\.methods\.DM"), ((None, "digits"), r"source = 'digits'.*dd\.data\.load")],
)
def test_arguments_of_another_type_are_told_what_to_be(arguments, message, source, method):
    given = [
        value if value is not None else default for value, default in zip(arguments, (method, source), strict=True)
    ]
    for call in (synthesize, estimate):
        with pytest.raises(InvalidSetting, match=message):
            call(*given)


def test_a_finished_set_that_was_damaged_says_how_to_make_it_anew(source, tmp_path):
    synthesize(RandomReal(ipc=1), source, out=tmp_path)
    (tmp_path / "images.safetensors").write_bytes(b"x")
    with pytest.raises(BadArtifact, match=r"the finished set of this run is damaged.*--overwrite"):
        synthesize(RandomReal(ipc=1), source, out=tmp_path)
    synthesize(RandomReal(ipc=1), source, out=tmp_path, overwrite=True)


def test_a_run_that_is_not_finished_is_called_so(source, method, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=tmp_path, callback=interrupt_after(3))
    with pytest.raises(BadArtifact, match="not finished: the same synthesize command continues it"):
        SyntheticDataset.load(tmp_path)
