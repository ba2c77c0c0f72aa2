"""The benchmark of decoupled methods: rows, record, resuming; and the recovery step beside the plain one."""

import importlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dsdistill.training import TrainingRecipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def made(benchmark, monkeypatch, tmp_path):
    """A function that runs the benchmark with a tiny plan and gives the path of its result."""
    decoupled = benchmark("quality.decoupled")
    plan = replace(
        decoupled.PLANS["digits"],
        networks=tuple(replace(one, width=4, depth=1) for one in decoupled.PLANS["digits"].networks[:1])
        + tuple(replace(one, width=6, depth=1) for one in decoupled.PLANS["digits"].networks[1:]),
        training=TrainingRecipe(epochs=1, batch_size=256),
        protocol=replace(
            decoupled.PLANS["digits"].protocol,
            epochs=1,
            network=replace(decoupled.PLANS["digits"].networks[0], width=4, depth=1),
        ),
        steps=1,
        pool=4,
        seeds=2,
    )
    monkeypatch.setattr(decoupled, "PLANS", {"tiny": plan})
    line = [str(ROOT / "benchmarks" / "quality" / "decoupled.py"), "--plan", "tiny", "--per_class", "4", "--ipc", "1"]
    methods = ["--methods", "RDED", "CVDD"]
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*line, *methods, "--device", "cpu", *folders])

    def make():
        decoupled.main()
        (path,) = tmp_path.glob("*.json")
        return path

    return make


def test_rows_have_both_labels_their_bytes_and_are_made_once(benchmark, made, monkeypatch):
    path = made()
    first = json.loads(path.read_text())
    assert [row["method"] for row in first["rows"]] == ["RandomReal", "RDED", "CVDD"]
    assert all(row["image_bytes"] == 10 * 64 * 4 for row in first["rows"])
    assert len({row["label_bytes"] for row in first["rows"]}) == 1
    assert [one["performance"] is not None for one in first["teachers"]] == [True, True]
    monkeypatch.setattr("dsdistill.relabel", None)
    second = json.loads(made().read_text())
    assert second["rows"] == first["rows"]
    report = benchmark("report")
    assert "CVDD" in str(report._taught(first))


def test_a_gain_that_is_none_of_the_rows_is_refused(benchmark, made):
    schema = benchmark("schema")
    content = json.loads(made().read_text())
    schema.RESULT.validate_python(content)
    content["rows"][1]["soft_gain"] = content["rows"][1]["soft"]
    with pytest.raises(ValidationError, match="gain of RDED"):
        schema.RESULT.validate_python(content)


OPTIONS = {"seed": 0, "device": "cpu", "per_class": 8, "precision": "float32"}


@pytest.mark.parametrize("networks", [["convnet"], ["convnet", "vgg11"]], ids=str)
def test_a_recovery_step_equals_the_plain_one(networks, benchmark):
    step = benchmark("speed.recover_step")
    found = step.check(Namespace(networks=networks, classes=3, together=2, **OPTIONS), torch.float64)
    assert all(one.relative < 1e-10 for one in found)


@pytest.mark.parametrize("program", ["loops", "dsdistill"])
def test_a_worker_times_a_program(program, benchmark, monkeypatch, capsys):
    step = benchmark("speed.recover_step")
    sizes = ["--networks=convnet", "--classes=2", "--steps=1", "--warmups=1"]
    monkeypatch.setattr("sys.argv", ["recover_step.py", *sizes, "--worker", program])
    step.main()
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
