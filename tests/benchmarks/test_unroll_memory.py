import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"device": "cpu", "seed": 0, "width": 4, "momentum": 0.9, "batch": 2, "repeats": 2}


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def unroll(benchmark):
    """A valid result as plain containers: the unroll grows fourfold, the sweep by a tenth."""
    schema = benchmark("schema")
    ways = [
        schema.UnrollWay.of("unroll", [5, 20], [100.0, 400.0], [[1.0, 2.0, 3.0], [8.0, 8.0, 8.0]]),
        schema.UnrollWay.of("sweep", [5, 20], [60.0, 66.0], [[3.0, 3.0, 3.0], [9.0, 10.0, 11.0]]),
    ]
    equality = {"quantity": "images", "dtype": "float64", "absolute": 0.0, "relative": 0.0, "tolerance": 1e-10}
    return {
        "kind": "unroll",
        "title": "a student",
        "settings": {"batch": 64},
        "other_load": 0.0,
        "ways": [way.model_dump() for way in ways],
        "slowdown": schema.slowdowns(ways),
        "equality": [equality],
    }


@pytest.fixture
def write(benchmark, tmp_path, monkeypatch):
    """Writes a result and gives its path."""
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "report.py")])

    def written(content):
        path = tmp_path / "unroll.json"
        benchmark("writing").write_result(path, content, seed=0, started=benchmark("writing").commit())
        return path

    return written


def test_ways_are_written_read_and_shown(benchmark, unroll, write):
    path = write(unroll)
    assert benchmark("schema").read_result(path).slowdown == {"sweep": [1.5, 1.25]}
    first, last = benchmark("report").tables(path.parent).splitlines()[-2:]
    assert first.startswith("| a student | unroll | 5 / 20 | 100 / 400 | **4.00x**, 20.0 MiB per step | 2 / 8 |  | 3 |")
    assert last.startswith("|  | sweep | 5 / 20 | 60 / 66 | **1.10x**, 0.4 MiB per step | 3 / 10 | 1.50 / 1.25 | 3 |")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["ways"][1].update(growth=1.0), "growth of 'sweep' does not follow"),
        (lambda content: content["ways"][1].update(mib_per_step=0.0), "growth of 'sweep' does not follow"),
        (lambda content: content["ways"][1]["seconds"].pop(), "no times for each of its steps"),
        (lambda content: content["ways"][1].update(steps=[20, 5]), "two lengths or more, ascending"),
        (lambda content: content["ways"][1].update(steps=[5, 10], mib_per_step=1.2), "at different lengths"),
        (lambda content: content["slowdown"].update(sweep=[1.5, 1.0]), "'slowdown' does not follow"),
        (lambda content: content["slowdown"].update(sweep=[1.5]), "longer than"),
        (lambda content: content["slowdown"].clear(), "'slowdown' does not follow"),
    ],
)
def test_figures_must_follow_from_the_measurements(unroll, write, change, message):
    unroll = json.loads(json.dumps(unroll))
    change(unroll)
    with pytest.raises(ValidationError, match=message):
        write(unroll)


def test_without_the_unroll_nothing_is_compared(benchmark, unroll):
    schema = benchmark("schema")
    assert schema.slowdowns([schema.UnrollWay(**unroll["ways"][1])]) == {}


def test_exact_ways_are_checked_against_the_unroll(benchmark, monkeypatch):
    module = benchmark("unroll_memory")
    found = module.check(Namespace(**OPTIONS), steps=3, batch=2)
    assert len(found) == 4
    assert all(one.dtype == "float64" and one.relative < 1e-10 for one in found)
    monkeypatch.setattr(module, "EXACT", ("truncated",))
    with pytest.raises(ValidationError, match=r"gradient of the images, truncated \(float64\) differs"):
        module.check(Namespace(**OPTIONS), steps=3, batch=2)


def test_a_worker_calls_once_for_memory_and_then_for_time(benchmark, monkeypatch):
    module, calls = benchmark("unroll_memory"), []
    make = module.backpropagate

    def counted(student, *rest):
        calls.append(student.steps)
        return make(student, *rest)

    monkeypatch.setattr(module, "backpropagate", counted)
    monkeypatch.setattr(module, "extra_memory", lambda call, device: call() and 3 * 2**20)
    monkeypatch.setattr(module, "_give_back_above", calls.append)
    made = module.work("sweep", Namespace(**OPTIONS, steps=[2]))
    assert made["peak_mib"] == 3.0
    assert len(made["seconds"]) == 2
    assert calls == [1, 2**20, 2, 2**25, 2, 2]


def test_extra_memory_is_what_a_call_takes(benchmark):
    module, cpu = benchmark("unroll_memory"), torch.device("cpu")
    # As much as is free below an earlier peak, and 200 MiB more.
    room = module._peak(cpu) - module.psutil.Process().memory_info().rss
    size = room + 200 * 2**20
    taken = module.extra_memory(lambda: torch.ones(size // 4), cpu)
    assert 0.9 * size < taken < 1.1 * size + 2**24
    with pytest.raises(RuntimeError, match="earlier peak"):
        module.extra_memory(lambda: None, cpu)
