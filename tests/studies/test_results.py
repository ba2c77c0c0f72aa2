import json

import pytest

from dsdistill.errors import BadArtifact
from dsdistill.studies import StudyResult, report

PROTOCOL = {"name": "dc", "epochs": 3, "lr": 0.01, "network": {"type": "NetworkSpec", "name": "convnet", "width": 8}}


def line(method="DM", ipc=1, seed=0, accuracies=(0.5, 0.7), random=(0.4, 0.5), **changes):
    """A finished cell as a ledger holds it."""
    gain = None if random is None else [one - other for one, other in zip(accuracies, random, strict=True)]
    return {
        "schema_version": 1,
        "key": f"{method}-{ipc}-{seed}-{json.dumps(changes, sort_keys=True)}",
        "status": "done",
        "method": method,
        "ipc": ipc,
        "seed": seed,
        "protocol": "dc",
        "whole": False,
        "settings": {"type": method, "ipc": ipc, "lr": 1.0, "network": {"name": "convnet", "width": 8}},
        "data": {"name": "toy", "fingerprint": "0123456789abcdef", "loading": {"zca": False}},
        "evaluation": {"protocol": PROTOCOL, "repeats": 2, "seed": seed, "whole_epochs": None},
        "accuracies": list(accuracies),
        "baselines": {} if random is None else {"random": list(random)},
        "gain": gain,
        "bytes": {"images": 100 * ipc, "labels": 4, "learned": 0, "total": 100 * ipc + 4, "random": 100 * ipc},
        **changes,
    }


def failed(**changes):
    return {**line(**changes), "status": "failed", "error": "Diverged", "message": "NaN", "traceback": "cells/x"}


def test_the_interval_is_over_seeds_each_of_which_counts_once():
    # Means of the seeds are 0.50, 0.52, 0.54: standard deviation 0.02, t(0.975, 2) = 4.302653, n = 3.
    rows = [
        line(seed=0, accuracies=(0.40, 0.60), random=(0.30, 0.50)),
        line(seed=1, accuracies=(0.52, 0.52), random=(0.41, 0.41)),
        line(seed=2, accuracies=(0.50, 0.58), random=(0.41, 0.43)),
    ]
    (point,) = StudyResult(tuple(rows)).points
    assert point.accuracy.values == pytest.approx((0.50, 0.52, 0.54))
    assert point.accuracy.mean == pytest.approx(0.52)
    assert point.accuracy.half_width == pytest.approx(4.302653 * 0.02 / 3**0.5, abs=1e-7)
    assert point.gain.values == pytest.approx((0.10, 0.11, 0.12))
    assert point.random.mean == pytest.approx((0.40 + 0.41 + 0.42) / 3)
    assert point.networks == {0: (0.40, 0.60), 1: (0.52, 0.52), 2: (0.50, 0.58)}  # the spread within is kept
    text = str(StudyResult(tuple(rows)))
    assert "52.00  ± 4.97     41.00  +11.00  ± 2.48             3 x 2" in text
    assert "over synthesis seeds; a seed counts once" in text
    assert "no interval" not in text


def test_one_seed_has_no_interval_whatever_its_networks():
    (point,) = StudyResult((line(),)).points
    assert point.accuracy.n == 1
    assert point.accuracy.to_json()["ci95"] is None
    text = str(StudyResult((line(),)))
    assert "one synthesis seed: no interval" in text
    assert "±" not in text


def test_points_are_methods_by_budget():
    rows = [line(method, ipc, seed) for seed in (0, 1) for method in ("RandomReal", "DM") for ipc in (10, 2)]
    found = [(point.method, point.ipc, point.bytes, point.accuracy.n) for point in StudyResult(tuple(rows)).points]
    assert found == [("RandomReal", 2, 204, 2), ("RandomReal", 10, 1004, 2), ("DM", 2, 204, 2), ("DM", 10, 1004, 2)]


def test_methods_of_one_name_are_told_apart_by_what_differs():
    other = line()["settings"] | {"lr": 2.0, "network": {"name": "convnet", "width": 16}}
    rows = [line(), line(settings=other), line("RandomReal"), line(ipc=2)]
    names = [point.method for point in StudyResult(tuple(rows)).points]
    assert names == [
        "DM lr=1.0 network.width=8",
        "DM lr=1.0 network.width=8",
        "DM lr=2.0 network.width=16",
        "RandomReal",
    ]


def test_different_scoring_and_data_are_different_tables():
    evaluation = line()["evaluation"]
    changed = [
        line(evaluation=evaluation | {"protocol": PROTOCOL | {"lr": 0.5}}),
        line(evaluation=evaluation | {"repeats": 9}),
        line(data=line()["data"] | {"loading": {"zca": True}}),
        line(data=line()["data"] | {"fingerprint": "fedc"}),
    ]
    for row in changed:
        result = StudyResult((line(), row))
        assert len({point.setting for point in result.points}) == 2, row
        assert [point.accuracy.n for point in result.points] == [1, 1]
    assert "protocol.lr=0.5" in str(StudyResult((line(), changed[0])))


def test_several_evaluation_seeds_of_one_synthesis_are_one_value():
    again = line(accuracies=(0.8, 0.8), evaluation=line()["evaluation"] | {"seed": 7})
    (point,) = StudyResult((line(), again, line(seed=1))).points
    assert point.networks == {0: (0.5, 0.7, 0.8, 0.8), 1: (0.5, 0.7)}
    assert point.accuracy.values == pytest.approx((0.7, 0.6))


def test_without_random_images_there_is_no_gain():
    (point,) = StudyResult((line(random=None), line(random=None, seed=1))).points
    assert point.random is None
    assert point.gain is None
    assert "3 x" not in str(StudyResult((line(random=None),)))


def test_a_report_reads_the_lines_alone(tmp_path):
    rows = [failed(), line(), line(seed=1), failed(seed=2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    before = (tmp_path / "results.jsonl").read_bytes()
    result = report(tmp_path)
    assert [row["status"] for row in result.rows] == ["done", "done", "failed"]
    assert result.points[0].accuracy.n == 2
    assert "1 cells failed:\n  DM-1-2-{}  DM ipc 1 seed 2: Diverged: NaN (cells/x)" in str(result)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    content = json.loads(json.dumps(result.to_json()))
    assert content["points"][0]["accuracy"]["n"] == 2
    assert content["points"][0]["networks"] == {"0": [0.5, 0.7], "1": [0.5, 0.7]}
    with pytest.raises(BadArtifact, match="holds no study"):
        report(tmp_path / "elsewhere")
    assert str(StudyResult(())) == "no cell is finished"
