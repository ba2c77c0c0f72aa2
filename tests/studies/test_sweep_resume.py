"""The record of the benchmark that kills a sweep, and its rows in the README."""

import importlib
from pathlib import Path

import pytest
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "sweep_resume.py")])
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def sweep():
    hashes = {"a" * 64: "0" * 64, "b" * 64: "1" * 64}
    scores = {"mean": 0.5, "std": None, "ci95": None, "n": 1, "values": [0.5]}
    point = {"method": "DM", "ipc": 1, "bytes": 2600, "accuracy": scores, "gain_over_random": scores}
    return {
        "kind": "sweep",
        "title": "two cells",
        "settings": {"seeds": 1},
        "cells": 2,
        "uninterrupted_seconds": 2.0,
        "kill": {"seconds": 1.0, "cells_done": 1, "steps": 3},
        "continued_seconds": 1.5,
        "equal": True,
        "uninterrupted": hashes,
        "continued": hashes,
        "points": [point, {**point, "ipc": 10, "gain_over_random": None}],
    }


def test_a_sweep_becomes_a_table_with_a_row_for_each_point(benchmark, sweep, tmp_path):
    report = benchmark("report")
    benchmark("writing").write_result(tmp_path / "sweep.json", sweep, seed=0, started=benchmark("writing").commit())
    first, second = report.tables(tmp_path).splitlines()[-2:]
    assert first.startswith(
        "| two cells | with 1 of 2 cells done and 3 steps of one | same bytes and accuracies as uninterrupted "
        "| DM | 1 | 2,600 | 50.0 | +50.0 | 1 |"
    )
    assert second.startswith("|  |  |  | DM | 10 | 2,600 | 50.0 |  | 1 |")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"equal": False}, "contradicts the hashes"),
        ({"continued": {"a" * 64: "0" * 64}}, "contradicts the hashes"),
        ({"cells": 3}, "do not fit together"),
        ({"kill": {"seconds": 1.0, "cells_done": 2, "steps": 3}}, "do not fit together"),
        ({"kill": {"seconds": 1.0, "cells_done": 0, "steps": 3}}, "greater than or equal to 1"),
    ],
)
def test_a_sweep_that_contradicts_itself_is_refused(benchmark, sweep, tmp_path, change, message):
    with pytest.raises(ValidationError, match=message):
        benchmark("writing").write_result(
            tmp_path / "sweep.json", {**sweep, **change}, seed=0, started=benchmark("writing").commit()
        )


def test_hashes_tell_sets_and_accuracies_apart(benchmark, tmp_path):
    module = benchmark("sweep_resume")
    cell = tmp_path / "cells" / "k"
    cell.mkdir(parents=True)

    def found(accuracy, images):
        line = f'{{"key": "k", "accuracies": [{accuracy}], "baselines": {{}}}}\n'
        (tmp_path / "results.jsonl").write_text(line + '{"torn')
        (cell / "images.safetensors").write_bytes(images)
        (cell / "labels.safetensors").write_bytes(b"")
        return module.fingerprints(tmp_path)["k"]

    assert len({found(0.5, b"x"), found(0.5000001, b"x"), found(0.5, b"y")}) == 3
    assert found(0.5, b"x") == found(0.5, b"x")
