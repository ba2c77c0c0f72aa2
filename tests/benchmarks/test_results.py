import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def speed(benchmark):
    """A valid result as plain containers."""
    schema = benchmark("schema")
    comparison = schema.Comparison.of("call", "loops", "dsdistill", [2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).model_dump()
    equality = {"quantity": "loss", "dtype": "float64", "absolute": 0.0, "relative": 0.0, "tolerance": 1e-10}
    return {
        "kind": "speed",
        "title": "a step",
        "unit": "step",
        "settings": {"steps": 1},
        "warmups": 1,
        "target": 2.0,
        "other_load": 0.0,
        "comparisons": [comparison],
        "equality": [equality],
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_result_is_valid(benchmark, path):
    benchmark("schema").read_result(path)


def test_tables_of_the_readme_are_up_to_date(benchmark):
    readme, report = ROOT / "README.md", benchmark("report")
    if not readme.exists() or report.BEGIN not in readme.read_text(encoding="utf-8"):
        pytest.skip("README.md has no place for results yet")
    text = readme.read_text(encoding="utf-8")
    assert report.updated(text) == text, "run python benchmarks/report.py"


def test_result_is_written_with_its_circumstances(benchmark, speed, tmp_path, monkeypatch):
    schema = benchmark("schema")
    here = str(ROOT / "benchmarks" / "speed" / "dm_step.py")
    monkeypatch.setattr(
        "sys.argv", [here, "--data", "/elsewhere/images", f"--out={ROOT / 'runs' / 'x'}", "--runs", "5"]
    )
    benchmark("writing").write_result(
        tmp_path / "new" / "speed.json", speed, seed=3, started=benchmark("writing").commit()
    )
    result = schema.read_result(tmp_path / "new" / "speed.json")
    assert result.command == "python -m benchmarks.speed.dm_step --data PATH/images --out=runs/x --runs 5"
    assert result.seed == 3
    assert result.hardware.cores >= 1
    assert result.hardware.gpu is None
    assert set(result.versions) >= {"python", "torch", "dsdistill"}
    assert result.comparisons[0].median_ratio == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "python -m x --data /home/me/images"}, "path of one machine"),
        ({"command": "python -m x --data=~/images"}, "path of one machine"),
        ({"date": "2026-01-01T00:00:00"}, "not a UTC date"),
        ({"kind": "taste"}, "kind"),
        ({"unknown": 1}, "Extra inputs"),
        ({"seed": None}, "seed"),
    ],
)
def test_wrong_records_are_refused(benchmark, speed, tmp_path, monkeypatch, change, message):
    schema = benchmark("schema")
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "report.py")])
    path = tmp_path / "speed.json"
    benchmark("writing").write_result(path, speed, seed=0, started=benchmark("writing").commit())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValidationError, match=message):
        schema.read_result(path)


def test_code_that_changed_during_a_measurement_is_dirty(benchmark, speed, tmp_path, monkeypatch):
    schema = benchmark("schema")
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "report.py")])
    started = schema.Commit(sha="0" * 40, dirty=False)
    benchmark("writing").write_result(tmp_path / "speed.json", speed, seed=0, started=started)
    assert schema.read_result(tmp_path / "speed.json").commit == schema.Commit(sha="0" * 40, dirty=True)


def test_headlines_must_follow_from_measurements(benchmark, speed):
    schema = benchmark("schema")
    with pytest.raises(ValidationError, match="do not follow from its seconds"):
        schema.Comparison(**{**speed["comparisons"][0], "median_ratio": 3.5})
    with pytest.raises(ValidationError, match="more than 1e-10"):
        schema.Equality(**{**speed["equality"][0], "relative": 0.01})
    good = {"mean": 0.5, "std": None, "ci95": None, "n": 1, "values": [0.5]}
    assert schema.Scores(**good).mean == 0.5
    for change in ({"mean": 0.6}, {"n": 2}, {"std": 0.0}):
        with pytest.raises(ValidationError, match="do not follow from the values"):
            schema.Scores(**{**good, **change})


def test_report_has_a_row_for_each_comparison(benchmark, speed, tmp_path, monkeypatch):
    report = benchmark("report")
    assert report.tables(tmp_path) == ""
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "report.py")])
    benchmark("writing").write_result(tmp_path / "speed.json", speed, seed=0, started=benchmark("writing").commit())
    last = report.tables(tmp_path).splitlines()[-1]
    assert last.startswith("| a step | call | 3 s | 1 s | **3.00x** (2.00 to 4.00) | 3 |")
    assert last.endswith("| [speed](benchmarks/results/speed.json) |")
    with pytest.raises(ValueError, match="lacks the marks"):
        report.updated("# no marks")


def test_dm_step_equals_the_plain_loop(benchmark):
    dm_step = benchmark("speed.dm_step")
    options = Namespace(classes=6, per_class=5, ipc=2, real_batch=3, seed=0, device="cpu")
    found = dm_step.check(options, torch.float64, iterations=2)
    assert [one.quantity for one in found] == ["loss", "gradient, largest", "gradient, median image"]
    assert all(one.relative < 1e-10 for one in found)


@pytest.mark.parametrize("op", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_random_views_of_the_plain_loop_are_given_views(benchmark, op):
    """The two forms of a view in the reference agree: some parameters explain what the random form shows."""
    reference = benchmark("speed.reference")
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shown = reference.random_view(images.repeat(4, 1, 1, 1), op, shared=True)
        torch.manual_seed(1)
        single = reference.random_view(images, op, shared=True)
    assert all(torch.equal(one, shown[0]) for one in shown)
    assert shown.shape == (4, 3, 8, 8)
    if op in ("crop", "cutout", "flip"):
        grid = [(u, v, 0.0) for u in range(-1, 10) for v in range(-1, 10)]
        candidates = [reference.given_view(images[0], op, torch.tensor(values)) for values in grid]
        assert any(torch.equal(single[0], one) for one in candidates)
