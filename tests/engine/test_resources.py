"""Memory and disk: what a run does when either runs out, and what it says beforehand."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from toys import Wander

import dsdistill as dd
from dsdistill import SyntheticDataset, estimate, synthesize
from dsdistill.core import storage
from dsdistill.core.device import is_out_of_memory
from dsdistill.engine.run import Execution, prepared_run
from dsdistill.errors import DistillError, Diverged, InvalidSetting, OutOfMemory, OutOfSpace
from dsdistill.matching import condensation
from dsdistill.methods import DC, DM, FYI, IDC
from dsdistill.methods import idc as idc_module
from dsdistill.networks import NetworkSpec

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Hungry(DM):
    """DM on a device that holds ``room`` images at a time, from step ``from_step`` on."""

    paper: ClassVar[str] = "none"
    room: int = 4
    from_step: int = 0
    problem: type[BaseException] = torch.OutOfMemoryError
    text: str = "CUDA out of memory. Tried to allocate 20.00 GiB"

    def step(self, run, state, iteration):
        if iteration >= self.from_step and run.chunk > self.room:
            state.images.pixels.data.add_(1)  # a failed step may leave anything behind
            raise self.problem(self.text)
        return super().step(run, state, iteration)


def hungry(method, **changes):
    known = {field.name: getattr(method, field.name) for field in fields(method)}
    return Hungry(**{**known, **changes})


@pytest.fixture(autouse=True)
def settings_need_no_json(monkeypatch):
    from dsdistill.engine import run, synthesizer

    for module in (run, synthesizer):
        monkeypatch.setattr(module, "to_dict", lambda method: {"type": type(method).__name__})


@pytest.mark.parametrize("from_step", [0, 3])
@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (RuntimeError, "MPS backend out of memory (MPS allocated: 9 GB)"),
        (MemoryError, ""),
    ],
    ids=["cuda", "cpu", "mps", "python"],
)
def test_a_step_that_runs_out_of_memory_is_made_again_with_half_the_chunk(
    problem, text, from_step, source, method, caplog
):
    plain = synthesize(method, source, chunk=16)
    made = synthesize(hungry(method, problem=problem, text=text, from_step=from_step), source, chunk=16)
    torch.testing.assert_close(made.tensors()[0], plain.tensors()[0], rtol=1e-4, atol=1e-5)
    expected = f"memory ran out at iteration {from_step}: from there on 4 images passed the network at a time"
    assert expected in made.recipe.notes[-1]
    assert [record.message.split(" (")[0] for record in caplog.records if "memory ran out" in record.message][
        -1
    ] == expected
    assert plain.recipe.notes == ()


def test_steps_not_yet_read_are_made_again_too(source, method, monkeypatch):
    """On an accelerator the last good state is some steps old when memory runs out."""
    from dsdistill.engine import run as module

    original = module._Watch.__init__

    def lazy(self, *arguments):
        original(self, *arguments)
        self.read_every = 5

    monkeypatch.setattr(module._Watch, "__init__", lazy)
    steps = []
    made = synthesize(
        hungry(method, from_step=3), source, chunk=8, callback=lambda event: steps.append(event.iteration)
    )
    assert steps == list(range(8))
    assert torch.allclose(made.tensors()[0], synthesize(method, source, chunk=8).tensors()[0], atol=1e-5)


def test_the_last_good_state_can_be_restored_more_than_once(source, method, monkeypatch):
    """Memory may run out twice between two looks at the state; optimisers keep and change what they are given."""
    from dsdistill.engine import run as module

    original = module._Watch.__init__

    def lazy(self, *arguments):
        original(self, *arguments)
        self.read_every = 4

    monkeypatch.setattr(module._Watch, "__init__", lazy)
    calls = []

    @dataclass(frozen=True, kw_only=True)
    class Unlucky(DM):
        def step(self, run, state, iteration):
            calls.append(iteration)
            if len(calls) in (7, 11):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().step(run, state, iteration)

    settings = {field.name: getattr(method, field.name) for field in fields(method)}
    made = synthesize(Unlucky(**settings), source, chunk=1000)
    assert calls == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 4, 5, 6, 7]
    plain = synthesize(method, source, chunk=1000)
    torch.testing.assert_close(made.tensors()[0], plain.tensors()[0], rtol=1e-4, atol=1e-5)


def test_a_lowered_chunk_and_its_note_survive_an_interruption(source, method, tmp_path):
    def stop(event):
        if event.iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(hungry(method), source, out=tmp_path / "out", checkpoint_every=2, callback=stop)
    seen = []
    made = synthesize(hungry(method), source, out=tmp_path / "out", callback=seen.append)
    assert made.recipe.execution["chunk"] == 4
    assert ["memory ran out at iteration 0" in note for note in made.recipe.notes] == [True] * 7  # 512 -> 4
    assert not any("other conditions" in note for note in made.recipe.notes)


def test_notes_about_memory_are_kept_when_a_run_diverges(source):
    @dataclass(frozen=True, kw_only=True)
    class Both(Wander):
        def step(self, run, state, iteration):
            if run.chunk > 2:
                raise MemoryError
            return super().step(run, state, iteration)

    with pytest.raises(Diverged) as caught:
        synthesize(Both(ipc=1, bad_at=3, one_job=True), source, chunk=4)
    first, second = caught.value.last_good.recipe.notes
    assert "memory ran out" in first
    assert "NOT FINISHED" in second


def test_batch_normalisation_is_not_helped_by_smaller_chunks(source, method):
    whole = replace(method, network=NetworkSpec(width=4, depth=1, norm="batch"))
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Greedy(DM):
        def step(self, run, state, iteration):
            run.network(self.network, iteration)
            seen.append(run.chunk)
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="with batch normalisation all images of a batch pass together"):
        synthesize(Greedy(**{field.name: getattr(whole, field.name) for field in fields(whole)}), source, chunk=16)
    assert seen == [16]


BATCHED = {"ipc": 2, "iterations": 1, "real_batch": 4, "network": NetworkSpec(width=4, depth=1, norm="batch")}
MATCHING = {
    "DC": DC(**BATCHED, outer_loop=2, inner_epochs=1),
    "FYI": FYI(base=DC(**BATCHED, outer_loop=2, inner_epochs=1)),
    "IDC": IDC(**BATCHED, inner_steps=2, trained_on=8),
}


@pytest.mark.parametrize("name", MATCHING)
def test_batch_normalisation_that_is_settled_is_helped_by_smaller_chunks(name, source, monkeypatch):
    match = condensation.match_gradients

    def greedy(run, *rest, **more):
        if run.chunk > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return match(run, *rest, **more)

    for module in (condensation, idc_module):
        monkeypatch.setattr(module, "match_gradients", greedy)
    assert synthesize(MATCHING[name], source, chunk=16).recipe.execution["chunk"] == 4


@pytest.mark.parametrize("name", MATCHING)
def test_training_on_batches_that_it_couples_is_not(name, source, monkeypatch):
    def greedy(*rest, **more):
        next(one for one in rest if isinstance(one, torch.nn.Module)).train()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(condensation, "train", greedy)
    monkeypatch.setattr(idc_module, "train_on_real", greedy)
    with pytest.raises(OutOfMemory, match="with batch normalisation all images of a batch pass together"):
        synthesize(MATCHING[name], source, chunk=16)


def test_one_image_at_a_time_is_the_end_and_the_message_says_what_to_turn(source, method):
    with pytest.raises(
        OutOfMemory, match=r"Hungry: out of memory with 1 images at a time \(CUDA.*Lower ipc or real_batch"
    ):
        synthesize(hungry(method, room=0), source)
    assert OutOfMemory.exit_code == 5


def test_running_out_of_memory_before_the_first_step_is_explained(source, method):
    class Greedy(DM):
        def start(self, run, job):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match=r"ipc or real_batch.*device with more memory"):
        synthesize(Greedy(ipc=1), source)


def test_other_errors_of_a_step_are_not_taken_for_lack_of_memory(source, method):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        synthesize(hungry(method, problem=RuntimeError, text="mat1 and mat2 shapes cannot be multiplied"), source)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_later_jobs_start_with_the_smaller_chunk(source):
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Choosy(Wander):
        def step(self, run, state, iteration):
            seen.append((state.labels.classes[0].item(), run.chunk))
            if run.chunk > 2:
                raise MemoryError
            return super().step(run, state, iteration)

    synthesize(Choosy(ipc=1, iterations=1), source, chunk=8)
    assert seen == [(0, 8), (0, 4), (0, 2), (1, 2), (2, 2)]


# Disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_the_first_step(source, method, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    steps = []
    with pytest.raises(OutOfSpace, match=r"out: \d+ bytes are needed and 5000 are free") as caught:
        synthesize(method, source, out=tmp_path / "out", callback=steps.append)
    # Images, as much again for two moments each; three checkpoints and the set.
    assert caught.value.needed >= 3 * 3 * (6 * 3 * 8 * 8 * 4)
    assert not steps
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_file_that_was_there(number, tmp_path, monkeypatch):
    target = tmp_path / "state.json"
    storage.write_bytes(target, b"before")

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match=r"state.json: 5 bytes are needed and \d+ are free"):
        storage.write_bytes(target, b"after")
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def _can_mount():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


_FULL = """
import sys
from pathlib import Path
from toys import slow_run
from dsdistill.engine import checkpoint
for size in sys.argv[2:]:
    folder = Path(sys.argv[1], size)
    try:
        slow_run(folder / "out", None)
    except Exception as error:
        print(size, type(error).__name__, error)
    print(size, "newest", (checkpoint.read_newest(folder / "out" / "run" / "jobs" / "all") or [None])[0])
    print(*(path.name for path in folder.rglob(".tmp-*")))
"""


@pytest.mark.skipif(not _can_mount(), reason="the system allows no private mounts")
def test_a_disk_that_fills_up_during_a_run(tmp_path):
    """Real file systems of a few kB: the run ends with the error for it, what was committed stays whole."""
    sizes = ("32k", "56k")
    mounts = [f"mkdir {tmp_path}/{size} && mount -t tmpfs -o size={size} none {tmp_path}/{size}" for size in sizes]
    script = " && ".join([*mounts, 'exec "$@"'])
    command = ["unshare", "-rm", "sh", "-c", script, "-", sys.executable, "-c", _FULL, str(tmp_path), *sizes]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for size in sizes:
        assert re.search(rf"^{size} OutOfSpace .*bytes are needed", done.stdout, re.MULTILINE), done.stdout
        assert f"{size} newest" in done.stdout
    assert ".tmp-" not in done.stdout


# Estimates ----------------------------------------------------------------------------------------------------


def test_an_estimate_counts_what_the_run_then_writes(source, method, tmp_path):
    method = replace(method, iterations=20)
    cost = estimate(method, source, out=tmp_path / "not" / "yet")
    assert (cost.steps, cost.chunk, cost.device) == (20, 512, "cpu")
    assert 3 <= cost.rehearsed <= 20
    assert cost.seconds > 0
    assert cost.memory > 50 * 2**20
    assert cost.free_disk > 0
    assert not (tmp_path / "not").exists()
    synthesize(method, source, out=tmp_path / "run", checkpoint_every=5, callback=None)
    final = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert final < cost.disk < final + 3 * 3 * 6 * 3 * 8 * 8 * 4


def test_estimates_of_methods_without_steps_and_of_several_jobs(source):
    assert estimate(dd.methods.RandomReal(ipc=2), source).steps == 0
    several = estimate(Wander(ipc=1, iterations=6), source)
    assert several.steps == 18
    assert "18 steps" in str(several)
    assert "free_disk" in several.to_json()


def test_an_estimate_finds_the_chunk_that_fits(source, method):
    assert estimate(hungry(method), source, chunk=16).chunk == 4
    with pytest.raises(InvalidSetting, match="chunk"):
        estimate(method, source, chunk=0)


def test_a_limited_execution_runs_its_first_steps_alone(source):
    run = prepared_run(Wander(ipc=1), source, seed=0, device="cpu", chunk=None)
    execution = Execution(Wander(ipc=1), run, limit=2, order=lambda jobs: jobs[1:])
    assert isinstance(execution(), SyntheticDataset)
    assert execution.state.extras["average"].shape == (3,)
    assert issubclass(OutOfSpace, DistillError)
