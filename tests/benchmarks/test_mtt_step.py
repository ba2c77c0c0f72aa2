"""The benchmark of an outer step of trajectory matching: both programs do the same, and both run."""

import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"ipc": 2, "classes": 2, "per_class": 3, "student_steps": 3, "batch_size": 3}


@pytest.fixture
def mtt_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.speed.mtt_step")


def options(backward):
    return Namespace(seed=0, device="cpu", backward=backward, **SIZES)


@pytest.mark.parametrize("backward", ["sweep", "unroll"])
def test_an_outer_step_equals_the_plain_unroll(mtt_step, backward):
    found = mtt_step.check(options(backward), torch.float64)
    assert [one.quantity for one in found] == [
        "loss",
        "gradient, largest",
        "gradient, median image",
        "gradient of the step size",
    ]
    assert all(one.relative < 1e-10 for one in found)


def test_a_gradient_that_is_another_is_refused(mtt_step):
    with pytest.raises(ValidationError, match="gradient, largest"):
        mtt_step.check(options("truncated"), torch.float64, iterations=1)


@pytest.mark.parametrize("program", ["loops", "dsdistill"])
def test_a_worker_times_a_program(mtt_step, program, monkeypatch, capsys):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    monkeypatch.setattr("sys.argv", ["mtt_step.py", *sizes, "--steps=1", "--worker", program])
    mtt_step.main()
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
