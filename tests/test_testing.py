"""One deliberately broken method per check of the contract suite: each must be found out."""

import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from dsdistill.data import ImageSource, Normalization
from dsdistill.engine import Job, PerClass, State
from dsdistill.errors import BadData, DistillError
from dsdistill.labels import HardLabels
from dsdistill.methods import RandomReal
from dsdistill.parameterizations import Decoded, Pixels
from dsdistill.testing import ContractViolation, check_synthesizer, toy_source

CHECKS = [
    "settings_are_complete",
    "makes_a_set",
    "same_seed_same_bytes",
    "other_seed_other_bytes",
    "leaves_global_randomness_alone",
    "resumes_bit_for_bit",
    "independent_of_job_order",
    "survives_save_and_load",
    "states_its_bytes",
]


@dataclass(frozen=True, kw_only=True)
class Sound(PerClass):
    """Keeps the contract: random images that drift, one job per class. The broken ones below change one thing."""

    paper: ClassVar[str] = "none"
    ipc: int = 1
    iterations: int = 4

    @property
    def steps(self):
        return self.iterations

    def jobs(self, run):
        return [Job(f"class/{c}", (c,)) for c in run.classes]

    def start(self, run, job):
        labels = HardLabels(torch.tensor(run.classes).repeat_interleave(self.ipc), run.source.num_classes)
        images = Pixels(torch.rand(labels.count, *run.source.shape, generator=run.rng.at("init")))
        return State(images, labels)

    def step(self, run, state, iteration):
        state.images.pixels.data += torch.rand((), generator=run.rng.at("step", iteration))
        return {"loss": torch.zeros(())}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is tested here


def found_out(method, message, source=None, error=ContractViolation):
    with pytest.raises(error, match=message):
        check_synthesizer(method, source)


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_a_sound_method_passes_every_check(iterations):
    assert check_synthesizer(Sound(iterations=iterations)) == CHECKS


def test_a_violation_is_a_failed_assertion():
    assert issubclass(ContractViolation, AssertionError)


def test_the_toy_source_keeps_its_test_split_shut():
    source = toy_source(classes=2, per_class=5, shape=(1, 4, 6), seed=1)
    assert (source.counts, source.shape, source.classes) == ((5, 5), (1, 4, 6), ("class 0", "class 1"))
    assert toy_source(classes=2, per_class=5, shape=(1, 4, 6), seed=1).fingerprint == source.fingerprint
    assert toy_source(classes=2, per_class=5, shape=(1, 4, 6), seed=2).fingerprint != source.fingerprint
    with pytest.raises(ContractViolation, match="opened the test split"):
        _ = source.test


# Settings ----------------------------------------------------------------------------------------------------


class Plain:
    paper = "none"
    ipc = 1


@dataclass
class Thawed:
    paper: ClassVar[str] = "none"
    ipc: int = 1


def test_settings_must_be_a_frozen_dataclass():
    found_out(Plain(), "Plain is no dataclass")
    found_out(Thawed(), "Thawed is not frozen")


class Undecorated(Sound):
    strength: float = 2.0


def test_a_setting_of_a_class_without_the_decorator_is_no_setting():
    found_out(Undecorated(), "Undecorated is no dataclass")


@dataclass(frozen=True, kw_only=True, repr=False)
class NoRepr(Sound):
    strength: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Shy(Sound):
    secret: float = field(default=2.0, repr=False)


def test_the_repr_must_show_every_setting():
    found_out(NoRepr(), r"repr of NoRepr leaves out \['strength'\]")
    found_out(Shy(), r"repr of Shy leaves out \['secret'\]")


@dataclass(frozen=True, kw_only=True)
class Nested(Sound):
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)


@dataclass(frozen=True, kw_only=True)
class Vague(Sound):
    sizes: Any = (1, 2)


@dataclass(frozen=True, kw_only=True)
class WithPath(Sound):
    weights: Path = Path("weights")


def test_settings_must_survive_json():
    found_out(Vague(), "settings of Vague do not survive JSON")
    found_out(Nested(), r"Nested\.pairs = \(\[1, 2\],\) is not valid", error=DistillError)
    found_out(WithPath(), "a setting of type .*Path cannot be written as JSON", error=TypeError)


@dataclass(frozen=True, kw_only=True)
class Anonymous(Sound):
    paper: ClassVar[str] = ""


def test_a_paper_must_be_named():
    found_out(Anonymous(), "Anonymous names no paper")


# The set made ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blank(Sound):
    iterations: int = 0

    def start(self, run, job):
        state = super().start(run, job)
        state.images.pixels.data[0, 0, 0, 0] = torch.nan
        return state


@dataclass(frozen=True, kw_only=True)
class Forgetful(Sound):
    iterations: int = 0

    def jobs(self, run):
        return super().jobs(run)[1:]


@dataclass(frozen=True, kw_only=True)
class Renaming(Sound):
    def finish(self, run, state):
        return replace(super().finish(run, state), classes=("a", "b", "c"))


@dataclass(frozen=True, kw_only=True)
class Restandardising(Sound):
    def finish(self, run, state):
        return replace(super().finish(run, state), normalization=Normalization((0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Blank(), "images are not finite"),
        (Forgetful(), r"classes without images: counts \(0, 1, 1\)"),
        (Renaming(), "classes differ from the source's"),
        (Restandardising(), "normalization differs from the source's"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PerClass) else "",
)
def test_the_set_must_be_one_of_the_task(method, message):
    found_out(method, message)


def test_nan_while_running_is_the_engines_own_error():
    @dataclass(frozen=True, kw_only=True)
    class Exploding(Sound):
        def step(self, run, state, iteration):
            state.images.pixels.data /= 0
            return {"loss": torch.tensor(1.0)}

    found_out(Exploding(), "iteration 0: the updated state is not finite", error=DistillError)


# Randomness --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dice(Sound):
    """Draws from a generator that nobody seeds."""

    source: str = "python"

    def step(self, run, state, iteration):
        fresh = torch.Generator()
        fresh.seed()
        drawn = {
            "python": random.random,
            "numpy": lambda: np.random.default_rng().random(),
            "torch": lambda: torch.rand((), generator=fresh).item(),
        }
        state.images.pixels.data += drawn[self.source]()
        return super().step(run, state, iteration)


@dataclass(frozen=True, kw_only=True)
class Stubborn(Sound):
    def start(self, run, job):
        state = super().start(run, job)
        state.images.pixels.data.fill_(0.5)
        return state

    def step(self, run, state, iteration):
        return {"loss": torch.zeros(())}


@dataclass(frozen=True, kw_only=True)
class Meddling(Sound):
    """Draws where the engine does not look after the global generator."""

    def check(self, source):
        torch.rand(())


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_unseeded_draws_are_found(source):
    found_out(Dice(source=source), r"two runs with seed 0 differ in \['images\.safetensors', 'dataset\.json'\]")


def test_a_seed_must_be_used():
    found_out(Stubborn(), "seeds 0 and 1 give the same images: the seed is not used")


def test_the_callers_global_state_must_stay():
    found_out(Meddling(), "the caller's global random state changed")


# State -------------------------------------------------------------------------------------------------------

memory = {}


@dataclass(frozen=True, kw_only=True)
class Hoarder(Sound):
    """Keeps a running sum outside its State: fine in one go, wrong after a resume."""

    def start(self, run, job):
        memory["sum"] = 0.0
        return super().start(run, job)

    def step(self, run, state, iteration):
        memory["sum"] += 0.25
        state.images.pixels.data += memory["sum"]
        return super().step(run, state, iteration)


@dataclass(frozen=True, kw_only=True)
class Counter(Sound):
    """Numbers its jobs as they come."""

    def prepare(self, run):
        memory["jobs"] = 0

    def start(self, run, job):
        memory["jobs"] += 1
        state = super().start(run, job)
        state.images.pixels.data += memory["jobs"]
        return state


@pytest.mark.parametrize("iterations", [2, 5])
def test_state_outside_the_state_is_found(iterations):
    found_out(Hoarder(iterations=iterations), rf"stopped after step {iterations // 2} and resumed differs in \['images")


@pytest.mark.parametrize("iterations", [0, 4])
def test_dependence_on_the_order_of_jobs_is_found(iterations):
    found_out(Counter(iterations=iterations), "the order of the jobs changes the result")


# The test split ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Peeking(Sound):
    def start(self, run, job):
        _ = run.source.test
        return super().start(run, job)


@dataclass(frozen=True, kw_only=True)
class PeekingEarly(Sound):
    def check(self, source):
        _ = source.test


def test_the_test_split_cannot_be_opened(source):
    found_out(Peeking(), "the test split is closed during synthesis", error=BadData)
    found_out(Peeking(), "the test split is closed during synthesis", source, error=BadData)


def test_the_test_split_cannot_be_opened_before_the_run_either(source):
    found_out(PeekingEarly(), "test split", error=(ContractViolation, BadData))
    found_out(PeekingEarly(), "test split", source, error=(ContractViolation, BadData))


# What is stored ----------------------------------------------------------------------------------------------


class Brighter(Pixels):
    """Decodes in a way that the stored form does not tell."""

    def decode(self, index=None):
        images, owner = super().decode(index)
        return Decoded(images + 1, owner)


@dataclass(frozen=True, kw_only=True)
class Mislabelled(Sound):
    made_of: ClassVar[type[Pixels]] = Brighter
    iterations: int = 0

    def start(self, run, job):
        state = super().start(run, job)
        return replace(state, images=type(self).made_of(state.images.pixels))


def test_a_saved_set_must_decode_as_before():
    found_out(Mislabelled(), "a saved set decodes differently once loaded")


def test_bytes_must_be_those_of_the_tensors(monkeypatch):
    monkeypatch.setattr(Pixels, "nbytes", 1)
    found_out(Sound(), "states 1 bytes, stores 2304")


# Sources -----------------------------------------------------------------------------------------------------


def test_the_suite_runs_on_a_source_of_ones_own():
    images = torch.randint(256, (8, 1, 5, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    source = ImageSource("mine", ("a", "b"), images, torch.arange(2).repeat_interleave(4))
    assert check_synthesizer(Sound(ipc=2), source, device="cpu") == CHECKS
    assert check_synthesizer(RandomReal(ipc=2), source) == CHECKS


def test_methods_may_use_what_the_engine_offers():
    """The global generator is seeded for each step, and random_real is the usual start."""

    @dataclass(frozen=True, kw_only=True)
    class Usual(Sound):
        def start(self, run, job):
            return State(*self.random_real(run))

        def step(self, run, state, iteration):
            state.images.pixels.data += torch.rand(())
            return {"loss": torch.zeros(())}

    assert check_synthesizer(Usual()) == CHECKS
