"""The benchmark of gradients at equal compute: its rows, its record, its resuming."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dsdistill.experts import Experts, PlainTraining
from dsdistill.methods import MTT
from dsdistill.networks import NetworkSpec

ROOT = Path(__file__).resolve().parents[2]
TINY = NetworkSpec(width=4, depth=1)
EXPERTS = Experts(count=1, training=PlainTraining(epochs=2, batch_size=512))


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def made(benchmark, monkeypatch, tmp_path):
    """A function that runs the benchmark with a tiny plan and gives the path of its result."""
    gradients = benchmark("quality.gradients")

    def methods(ipc):
        shared = {"iterations": 6, "student_steps": 3, "max_start_epoch": 1, "network": TINY, "experts": EXPERTS}
        return {"MTT": MTT(ipc=ipc, lr_images=8.0, lr_lr=2.0**-20, **shared)}

    plan = gradients.Plan(methods, seeds=2, networks=1, epochs=1, network=TINY)
    monkeypatch.setattr(gradients, "PLANS", {"tiny": plan})
    line = [str(ROOT / "benchmarks" / "quality" / "gradients.py"), "--plan", "tiny", "--truncated", "1", "0.5"]
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*line, "--per_class", "3", "--device", "cpu", *folders])

    def make():
        gradients.main()
        (path,) = tmp_path.glob("*.json")
        return path

    return make


def test_rows_get_equal_compute_and_are_made_once(benchmark, made, monkeypatch):
    path = made()
    first = json.loads(path.read_text())
    exact, same, half = first["rows"]
    assert [(row["backward"], row["factor"]) for row in first["rows"]] == [
        ("sweep", 1.0),
        ("truncated", 1.0),
        ("truncated", 0.5),
    ]
    assert half["settings"]["lr_images"] == 4.0
    assert half["settings"]["lr_lr"] == 2.0**-21
    assert exact["iterations"] == 6 < same["iterations"] == half["iterations"]
    assert abs(same["iterations"] * same["step_flops"] - 6 * exact["step_flops"]) <= same["step_flops"] / 2
    assert [row["settings"]["backward"] for row in first["rows"]] == ["sweep", "truncated", "truncated"]
    assert all(len(row["loss"]) == row["accuracy"]["n"] == 2 for row in first["rows"])
    benchmark("schema").read_result(path)

    def refuse(*_, **__):
        raise AssertionError("a score that was kept is made again")

    monkeypatch.setattr(benchmark("quality.matching").dd, "evaluate", refuse)
    assert json.loads(made().read_text())["rows"] == first["rows"]
    shown = benchmark("report").tables(path.parent)
    assert "| truncated | x 0.5 |" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(iterations=2 * rows[1]["iterations"]), "truncated x1.0 did not get as much"),
        (lambda rows: rows[1].update(difference=None), "difference of truncated x1.0"),
        (lambda rows: rows[1]["accuracy"].update(values=[0.0, 1.0], mean=0.5), "do not follow|difference of"),
        (lambda rows: rows[0].update(difference=rows[1]["difference"]), "differs from itself"),
        (lambda rows: rows[1]["loss"].pop(), "one time and loss for each seed"),
    ],
)
def test_figures_must_follow_from_the_measurements(benchmark, change, message):
    schema = benchmark("schema")
    scores = schema.Statistics
    row = {"settings": {}, "seconds": [1.0, 1.0], "loss": [0.5, 0.5], "backward": "truncated", "factor": 1.0}
    work = {"iterations": 12, "step_flops": 10}
    rows = [
        {**row, **work, "backward": "sweep", "accuracy": scores((0.5, 0.7)).to_json(), "difference": None},
        {
            **row,
            **work,
            "accuracy": scores((0.6, 0.6)).to_json(),
            "difference": scores((0.6 - 0.5, 0.6 - 0.7)).to_json(),
        },
    ]
    data = {"name": "x", "fingerprint": "0" * 64, "train_images": 1, "test_images": 1, "jpeg": False}
    told = {"sha": "0" * 40, "dirty": False}
    hardware = {"cpu": "c", "cores": 1, "threads": 1, "memory_gib": 1.0, "gpu": None, "system": "s"}
    record = {"title": "t", "hardware": hardware, "versions": {}, "commit": told, "command": "c", "seed": 0}
    record |= {"kind": "gradients", "date": "2026-01-01T00:00:00+00:00", "data": data, "ipc": 1, "networks": 1}
    record |= {"protocol": {}, "rows": rows}
    record = json.loads(json.dumps(record))
    schema.RESULT.validate_python(record)
    change(record["rows"])
    with pytest.raises(ValidationError, match=message):
        schema.RESULT.validate_python(record)


def test_operations_are_counted_through_gradients_of_gradients(benchmark):
    one, other = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    with benchmark("quality.gradients").FlopCounter() as counter:
        product = one @ other
        assert counter.total == 2 * 2 * 3 * 5
        (slope,) = torch.autograd.grad(product.square().sum(), one, create_graph=True)
        assert counter.total == 2 * 2 * 2 * 3 * 5
        torch.autograd.grad(slope.sum(), other)
    assert counter.total > 3 * 2 * 2 * 3 * 5
