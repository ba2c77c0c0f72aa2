"""Numbers that are none, seeds of every kind, and what must not change a result."""

import builtins
import json
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from faults import nursery
from toys import Wander

from dsdistill import SyntheticDataset, synthesize
from dsdistill.engine import checkpoint
from dsdistill.errors import Diverged, InvalidSetting
from dsdistill.methods import DM, RandomReal


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(nursery.os, "fsync", lambda descriptor: None)


@dataclass(frozen=True, kw_only=True)
class Faulty(Wander):
    """Wander that reports ``value`` as its loss, or puts it into a moment of its optimizer, at step ``at``."""

    at: int = 0
    place: str = "loss"
    value: str = "nan"

    def step(self, run, state, iteration):
        metrics = super().step(run, state, iteration)
        if iteration != self.at:
            return metrics
        if self.place == "loss":
            return {"loss": torch.tensor(float(self.value))}
        (moments,) = state.optimizers["images"].state.values()
        moments["exp_avg_sq"][0, 0, 0, 0] = float(self.value)  # the image itself stays finite, and stops learning
        return metrics


@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize(
    ("place", "value", "culprit"),
    [("loss", "nan", "loss"), ("loss", "-inf", "loss"), ("optimizer", "inf", "the updated state")],
)
def test_a_number_that_is_none_ends_the_run_at_that_step(at, place, value, culprit, source, tmp_path):
    method = Faulty(one_job=True, ipc=1, at=at, place=place, value=value)
    with pytest.raises(Diverged, match=f"iteration {at}: {culprit} is not finite") as caught:
        synthesize(method, source, out=tmp_path, checkpoint_every=1)
    assert caught.value.exit_code == 4
    kept = SyntheticDataset.load(tmp_path / "run" / "last-good")
    assert f"NOT FINISHED: diverged at iteration {at}; this is the state after {at} iterations" in kept.recipe.notes
    good = synthesize(Wander(one_job=True, ipc=1, iterations=at), source)
    assert torch.equal(kept.tensors()[0], good.tensors()[0])
    assert not (tmp_path / "dataset.json").exists()
    newest = checkpoint.read_newest(tmp_path / "run" / "jobs" / "all")  # nothing unreadable was written
    assert (newest[0] if newest else 0) == at
    with pytest.raises(Diverged):  # and the same command comes to the same end
        synthesize(method, source, out=tmp_path, checkpoint_every=1)


def test_an_exploding_step_size_ends_with_finite_images(source, tmp_path, method):
    from dataclasses import replace

    from dsdistill.networks import NetworkSpec

    wild = replace(method, lr_images=1e38, iterations=50, network=NetworkSpec(width=8, norm="none"))
    with pytest.raises(Diverged, match="Lower the learning rate") as caught:
        synthesize(wild, source, out=tmp_path)
    assert bool(torch.isfinite(SyntheticDataset.load(caught.value.saved).tensors()[0]).all())


# Seeds --------------------------------------------------------------------------------------------------------


def files(method, source, folder, **options):
    synthesize(method, source, out=folder, **options)
    return nursery.contents(folder)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_seed_of_another_library_is_the_same_seed(kind, source, tmp_path):
    plain = files(Wander(), source, tmp_path / "plain", seed=7, checkpoint_every=2, chunk=3)
    other = files(Wander(), source, tmp_path / "other", seed=kind(7), checkpoint_every=np.int64(2), chunk=np.int32(3))
    assert plain == other
    assert json.loads(other["dataset.json"])["recipe"]["seed"] == 7


def test_seeds_of_any_size_and_sign_differ_and_repeat(source, tmp_path):
    seeds = (0, 1, -1, 2**63, 2**64, 2**70, -(2**70))
    first, second = ([files(Wander(), source, tmp_path / f"{n} {seed}", seed=seed) for seed in seeds] for n in (1, 2))
    assert first == second
    assert len({content["images.safetensors"] for content in first}) == len(seeds)


@pytest.mark.parametrize("seed", [True, False, np.True_, 1.0, np.float64(1), "1", None, [1], np.arange(2)], ids=repr)
def test_what_is_no_integer_is_no_seed(seed, source, tmp_path):
    with pytest.raises(InvalidSetting, match=r"seed = .* is not valid: an integer"):
        synthesize(RandomReal(ipc=1), source, seed=seed, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["checkpoint_every", "keep", "chunk"])
@pytest.mark.parametrize("value", [True, 0, -5, 1.0, "1"], ids=repr)
def test_what_is_no_count_is_refused(name, value, source):
    with pytest.raises(InvalidSetting, match=f"{name} = .*an integer of at least 1"):
        synthesize(RandomReal(ipc=1), source, **{name: value})


@pytest.mark.parametrize("value", [True, np.int64(1), 1.5, "1", None], ids=repr)
def test_settings_are_python_integers(value):
    with pytest.raises(InvalidSetting, match=r"DM\.ipc"):
        DM(ipc=value)


def test_the_number_of_threads_is_on_record(source):
    before = torch.get_num_threads()
    recipes = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            recipes.append(synthesize(RandomReal(ipc=1), source).recipe)
    finally:
        torch.set_num_threads(before)
    assert [recipe.execution["threads"] for recipe in recipes] == [1, 2]


def test_a_clock_that_runs_backwards_changes_nothing(source, method, tmp_path, monkeypatch):
    expected = files(method, source, tmp_path / "calm")
    clock = iter(builtins.range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    seen = []
    synthesize(method, source, out=tmp_path / "back", checkpoint_every=2, callback=seen.append)
    assert nursery.contents(tmp_path / "back") == expected
    assert all(event.seconds >= 0 for event in seen)
