"""Studies under protocols that learn from teachers."""

from dataclasses import replace

import pytest
from relabelling.makers import CUT, SPEC, make_committee

import dsdistill as dd
from dsdistill import studies
from dsdistill.errors import InvalidSetting
from dsdistill.evaluation import EvaluationProtocol
from dsdistill.experts import Committee
from dsdistill.relabelling import Distances, label_bytes
from dsdistill.studies.worker import SOURCES
from dsdistill.synthetic import SyntheticDataset

PROTOCOL = EvaluationProtocol(
    name="quick",
    network=SPEC,
    epochs=2,
    batch_size=4,
    augmentation=CUT.augmentation,
    mix=CUT.mix,
    distillation=CUT.distillation,
    vote_temperature=10.0,
)


@pytest.fixture
def teachers(source, tmp_path):
    for teacher in make_committee(source):
        teacher.save(tmp_path / "teachers" / teacher.name)
    return tmp_path / "teachers"


def grid(source, tmp_path, teachers, **options):
    settings = {"ipc": 1, "seeds": 2, "repeats": 1, "workers": 1, "devices": "cpu", "protocol": PROTOCOL}
    return studies.grid(source, "RandomReal", out=tmp_path / "study", teachers=teachers, **settings | options)


def test_cells_are_scored_by_their_teachers_with_hard_labels_beside(source, teachers, tmp_path):
    result = grid(source, tmp_path, teachers)
    row = result.done[0]
    made = SyntheticDataset.load(tmp_path / "study" / "cells" / row["key"])
    committee = Committee.load(teachers)
    alone = dd.evaluate(made, source, protocol=PROTOCOL, teachers=committee, repeats=1, device="cpu", seed=row["seed"])
    assert row["accuracies"] == list(alone.scores["synthetic"].values)
    assert row["baselines"]["synthetic, hard"] == list(alone.scores["synthetic, hard"].values)
    taught = label_bytes(made, committee, PROTOCOL)
    assert row["bytes"]["total"] == made.nbytes.total + taught
    stored = dd.relabel(made, committee, PROTOCOL, device="cpu", progress=False)
    assert stored.nbytes == taught
    (point,) = result.points
    assert point.hard.n == 2
    assert "hard %" in str(result)
    assert point.to_json()["hard"]["n"] == 2


def test_other_teachers_or_priors_make_other_cells(source, teachers, tmp_path, monkeypatch):
    first = grid(source, tmp_path, teachers)
    assert [row["key"] for row in grid(source, tmp_path, teachers).done] == [row["key"] for row in first.done]
    one = Committee.load(teachers)[0]
    replace(one, performance=20.0).save(teachers / one.name)
    again = grid(source, tmp_path, teachers)
    assert not {row["key"] for row in again.done} & {row["key"] for row in first.done}
    moved = teachers.rename(tmp_path / "moved")
    assert [row["key"] for row in grid(source, tmp_path, moved).done] == [row["key"] for row in again.done]


def test_teachers_that_change_while_it_runs_fail_their_cells(source, teachers, tmp_path, monkeypatch):
    give = SOURCES.give

    def meddle(key, images):
        one = Committee.load(teachers)[0]
        replace(one, performance=20.0).save(teachers / one.name)
        give(key, images)

    monkeypatch.setattr(SOURCES, "give", meddle)
    result = grid(source, tmp_path, teachers)
    assert [row["status"] for row in result.rows] == ["failed", "failed"]
    assert "others than when the study began" in result.rows[0]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": None}, "protocol = 'quick' .*unless teachers are named"),
        ({"protocol": "dsa"}, "teachers = .*none: protocol dsa has no distillation"),
    ],
)
def test_protocols_and_teachers_go_together(options, message, source, teachers, tmp_path):
    with pytest.raises(InvalidSetting, match=message):
        grid(source, tmp_path, **{"teachers": teachers, **options})
    assert not (tmp_path / "study").exists()


def test_a_vote_by_priors_that_are_not_known_is_refused(source, teachers, tmp_path):
    one = Committee.load(teachers)[0]
    replace(one, performance=None).save(teachers / one.name)
    with pytest.raises(InvalidSetting, match="vote temperature"):
        grid(source, tmp_path, teachers)
    grid(source, tmp_path, teachers, protocol=replace(PROTOCOL, vote_temperature=None))


def test_a_methods_own_teachers_are_known_by_what_they_are(source, teachers, tmp_path):
    method = dd.methods.RDED(ipc=1, pool=4, teachers=dd.experts.Teachers(folder=str(teachers / "teacher0")))

    def keys(folder):
        chosen = replace(method, teachers=dd.experts.Teachers(folder=str(folder)))
        settings = {"ipc": 1, "seeds": 1, "repeats": 1, "workers": 1, "devices": "cpu", "protocol": "dsa", "epochs": 1}
        return [row["key"] for row in studies.grid(source, chosen, out=tmp_path / "study", **settings).done]

    first = keys(teachers / "teacher0")
    moved = (teachers / "teacher0").rename(tmp_path / "moved")
    assert keys(moved) == first
    make_committee(source)[1].save(moved)
    assert keys(moved) != first


def test_labels_of_distances_and_of_random_images_are_counted_as_they_are(source, teachers):
    made = dd.synthesize(dd.methods.RandomReal(ipc=2), source)
    committee, far = Committee.load(teachers), replace(PROTOCOL, distillation=Distances())
    stored = dd.relabel(made, committee, far, kind="distances", device="cpu", progress=False)
    assert label_bytes(made, committee, far) == stored.nbytes
    other = dd.synthesize(dd.methods.RandomReal(ipc=3), source)
    assert label_bytes(made, committee, PROTOCOL, len(other)) == label_bytes(other, committee, PROTOCOL)


def test_what_cannot_be_scored_is_refused_before_it_is_distilled(source, teachers, tmp_path):
    far = replace(PROTOCOL, distillation=Distances())
    with pytest.raises(InvalidSetting, match="distances are asked of small sets"):
        grid(source, tmp_path, teachers, protocol=far, baselines=("random", "whole"))
    assert not (tmp_path / "study").exists()


def test_methods_that_take_one_teacher_refuse_a_committee_before_any_work(source, teachers, tmp_path):
    committee = dd.experts.Teachers(folder=str(teachers))
    for method in (dd.methods.RDED(ipc=1, pool=4, teachers=committee), dd.methods.SRe2L(ipc=1, teachers=committee)):
        with pytest.raises(InvalidSetting, match="takes one teacher"):
            studies.grid(source, method, out=tmp_path / "study", ipc=1, seeds=1, workers=1)
        with pytest.raises(InvalidSetting, match="takes one teacher"):
            dd.synthesize(method, source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidSetting, match="a folder of teachers"):
        grid(source, tmp_path, Committee.load(teachers)[:])
