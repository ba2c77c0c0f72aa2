"""The benchmark of training experts: both programs do the same, and both run."""

import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"classes": 2, "per_class": 3, "batch": 4}


@pytest.fixture
def experts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.speed.experts")


def options(training, count=1, together=1):
    return Namespace(
        seed=0, device="cpu", training=training, experts=count, together=together, compiled=False, epochs=2, **SIZES
    )


@pytest.mark.parametrize(("training", "count", "together"), [("plain", 1, 1), ("flat", 1, 1), ("plain", 3, 2)])
def test_trajectories_equal_those_of_the_plain_loop(experts, training, count, together):
    found = experts.check(options(training, count, together), torch.float64)
    assert [one.quantity for one in found] == ["movement, largest", "movement, median parameter"]
    assert all(one.relative < 1e-9 for one in found)


def test_a_trajectory_that_is_another_is_refused(experts, monkeypatch):
    monkeypatch.setattr(experts, "_look_around", lambda *_: None)
    with pytest.raises(ValidationError, match="movement, largest"):
        experts.check(options("flat"), torch.float64)


@pytest.mark.parametrize("program", ["loops", "dsdistill"])
def test_a_worker_times_a_program(experts, program, monkeypatch, capsys):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    monkeypatch.setattr("sys.argv", ["experts.py", *sizes, "--training=flat", "--worker", program])
    experts.main()
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
