import importlib
from argparse import Namespace
from pathlib import Path

import pytest
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def memory(benchmark):
    """A valid result as plain containers: building grows by 2 MiB over 100 images, drawing does not grow."""
    seconds = {"build_seconds": 1.0, "open_seconds": 0.1, "draw_seconds": 2.0, "pass_seconds": 0.5}
    points = [
        {"images": images, "file_mib": images / 8, **seconds, "build_peak_mib": build, "worker_peak_mib": 30.0,
         "draw_peak_mib": 120.0}
        for images, build in ((100, 110.0), (200, 112.0))
    ]  # fmt: skip
    grown = benchmark("schema").Growth.of
    growth = {"build": grown([100, 200], [110.0, 112.0]), "draw": grown([100, 200], [120.0, 120.0])}
    return {
        "kind": "memory",
        "title": "small images",
        "settings": {"classes": 2, "draws": 3, "per_class": 4},
        "baseline_mib": 100.0,
        "points": points,
        "growth": {name: one.model_dump() for name, one in growth.items()},
    }


def test_a_curve_is_written_read_and_shown(benchmark, memory, tmp_path, monkeypatch):
    schema, report = benchmark("schema"), benchmark("report")
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "report.py")])
    benchmark("writing").write_result(tmp_path / "memory.json", memory, seed=0, started=benchmark("writing").commit())
    assert schema.read_result(tmp_path / "memory.json").growth["build"].bytes_per_image == 2 * 2**20 / 100
    first, last = report.tables(tmp_path).splitlines()[-2:]
    assert first.startswith("| small images; 3 draws of 2 x 4 | 100 | 12 | 100 | **110** | **120** |")
    assert "| **112** (+20972 B/image) | **120** (+0 B/image) |" in last


def test_growth_must_follow_from_the_peaks(benchmark, memory, tmp_path, monkeypatch):
    schema = benchmark("schema")
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "report.py")])
    with pytest.raises(ValidationError, match="bytes_per_image does not follow"):
        schema.Growth(images=[1, 2], peak_mib=[1.0, 2.0], bytes_per_image=0.0)
    with pytest.raises(ValueError, match="two sets or more, ascending"):
        schema.Growth.of([2, 1], [1.0, 2.0])
    memory["points"][1]["draw_peak_mib"] = 999.0
    with pytest.raises(ValidationError, match="the growth of 'draw' is not that of the points"):
        benchmark("writing").write_result(
            tmp_path / "memory.json", memory, seed=0, started=benchmark("writing").commit()
        )


def test_images_of_the_benchmark_are_all_different_and_dealt_out(benchmark, tmp_path):
    curve = benchmark("memory_curve")
    curve.write_images(tmp_path, 0, 25, seed=0)
    curve.write_images(tmp_path, 25, 40, seed=0)
    files = sorted(tmp_path.glob("*/*.png"))
    assert len({path.read_bytes() for path in files}) == len(files) == 40
    assert {path.parent.name for path in files} == {str(number) for number in range(10)}


def test_a_measurement_draws_what_was_built(benchmark, tmp_path, monkeypatch):
    curve = benchmark("memory_curve")
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        curve.write_images(tmp_path / "images" / split, 0, 20, seed=0)
    options = Namespace(folder=tmp_path / "images", seed=0, draws=2, per_class=2)
    built, drawn = curve.measure_build(options), curve.measure_draw(options)
    assert built["file_mib"] == 20 * 3 * 64 * 64 / 2**20
    assert min(built["build_peak_mib"], drawn["draw_peak_mib"]) > 50
