"""The benchmark of all methods under one evaluator: its rows, its record, its resuming."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from dsdistill.methods import DM, FYI, RandomReal, list_methods
from dsdistill.networks import NetworkSpec

ROOT = Path(__file__).resolve().parents[2]
TINY = NetworkSpec(width=4, depth=1)


@pytest.fixture
def matching(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.quality import matching

    return matching


def plan_of(matching):
    base = DM(iterations=2, real_batch=4, network=TINY)
    methods = {"DM": base, "FYI+DM": FYI(base=base), "RandomReal": RandomReal()}
    return matching.Plan(
        lambda ipc: {name: method.with_ipc(ipc) for name, method in methods.items()},
        seeds=2,
        networks=1,
        epochs=1,
        network=TINY,
    )


def test_every_row_is_made_once_and_paired_by_seed(matching, tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "PLANS", {"tiny": plan_of(matching)})
    here = str(ROOT / "benchmarks" / "quality" / "matching.py")
    line = [here, "--plan", "tiny", "--ipc", "1", "--protocols", "dsa", "fyi", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*line, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)])
    matching.main()
    (path,) = tmp_path.glob("*.json")
    first = json.loads(path.read_text())
    assert [(row["method"], row["protocol"]) for row in first["rows"]] == [
        (name, protocol) for protocol in ("dsa", "fyi") for name in ("RandomReal", "DM", "FYI+DM")
    ]
    for row in first["rows"]:
        assert row["accuracy"]["n"] == 2
        assert (row["gain_over_base"] is not None) == row["method"].startswith("FYI")

    def refuse(*_, **__):
        raise AssertionError("a score that was kept is made again")

    monkeypatch.setattr(matching.dd, "evaluate", refuse)
    matching.main()
    assert json.loads(path.read_text())["rows"] == first["rows"]
    from benchmarks.schema import read_result

    read_result(path)
    first["rows"][1]["gain_over_random"] = first["rows"][2]["gain_over_base"]
    path.write_text(json.dumps(first))
    with pytest.raises(ValidationError, match="not the difference of the rows"):
        read_result(path)


@pytest.mark.parametrize("name", ["digits", "short", "published"])
def test_plans_have_a_row_for_every_method(name, matching):
    rows = matching.PLANS[name].methods(10)
    assert all(method.ipc == 10 for method in rows.values())
    if name != "published":
        decoupled = {"CDA", "CVDD", "INFER", "NRRDD", "RDED", "SRe2L"}  # rows of `benchmarks.quality.decoupled`
        drawn = {"D4M", "Diffusion", "EVLF", "MGD3", "Minimax"}  # which learn no pixels
        wanted = set(list_methods()) - {"FYI"} - decoupled - drawn
        assert {type(method).__name__ for method in rows.values()} - {"FYI"} == wanted
