"""What is whole and what is not, of labels and teachers, by the library and on the command line."""

import json
import os

import pytest
import torch
from relabelling.makers import CUT, make_committee, make_set

from dsdistill import studies
from dsdistill.cli.main import main
from dsdistill.core import storage
from dsdistill.errors import BadArtifact
from dsdistill.experts.committee import ORDER
from dsdistill.relabelling import relabel
from dsdistill.studies.verify import verify


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def labels(source, tmp_path):
    relabel(
        make_set(source), make_committee(source), CUT, epochs=2, device="cpu", out=tmp_path / "labels", progress=False
    )
    return tmp_path / "labels"


@pytest.fixture
def teachers(source, tmp_path):
    for teacher in make_committee(source):
        teacher.save(tmp_path / "teachers" / teacher.name)
    storage.write_json(tmp_path / "teachers" / ORDER, [teacher.name for teacher in make_committee(source)])
    return tmp_path / "teachers"


def flip(path, position=-5):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def damaged(folder):
    return [finding.path.relative_to(folder).as_posix() for finding in verify(folder) if finding.problem]


def test_labels_are_whole_or_name_the_file_that_is_not(labels, capsys):
    assert [finding.what for finding in verify(labels)] == ["list of labels", "labels", "labels", "labels as a whole"]
    assert damaged(labels) == []
    assert main(["verify", str(labels)]) == 0
    flip(labels / "epoch-00001.safetensors")
    assert damaged(labels) == ["epoch-00001.safetensors"]
    capsys.readouterr()
    assert main(["verify", str(labels)]) == 6
    assert "DAMAGED  labels              " in capsys.readouterr().out
    (labels / "labels.json").write_bytes(b"{")
    assert damaged(labels) == ["labels.json"]


def test_labels_that_grow_are_looked_at_too(labels):
    os.replace(labels / "labels.json", labels / "growing.json")
    assert [finding.what for finding in verify(labels)] == ["list of labels", "labels", "labels"]
    (labels / "epoch-00000.safetensors").unlink()
    assert damaged(labels) == ["epoch-00000.safetensors"]


def test_files_that_are_whole_but_no_labels_are_found(labels):
    manifest = storage.read_json(labels / "labels.json")
    data = storage.encode_tensors({"x": torch.zeros(1)})
    storage.write_bytes(labels / "epoch-00000.safetensors", data)
    manifest["files"]["epoch-00000.safetensors"] = {"bytes": len(data), "sha256": storage.sha256(data)}
    manifest.pop("seal")
    storage.write_json(labels / "labels.json", storage.sealed(manifest))
    assert damaged(labels) == ["."]


def test_teachers_are_whole_or_name_the_file_that_is_not(teachers):
    assert damaged(teachers) == []
    assert verify(teachers)[-1].what == "committee"
    name = sorted(place.name for place in teachers.iterdir() if place.is_dir())[1]
    assert damaged(teachers / name) == []
    flip(teachers / name / "weights.safetensors")
    assert damaged(teachers) == [f"{name}/weights.safetensors"]
    assert damaged(teachers / name) == ["weights.safetensors"]


def test_a_member_that_is_not_finished_is_a_problem(teachers):
    storage.write_json(teachers / ORDER, [*storage.read_json(teachers / ORDER), "late"])
    (finding,) = [finding for finding in verify(teachers) if finding.problem]
    assert "the training of late is not finished" in finding.problem


def test_a_teacher_of_foreign_code_is_checked_and_not_run(teachers):
    place = next(place for place in teachers.iterdir() if place.is_dir())
    manifest = storage.read_json(place / "teacher.json")
    manifest["network"]["name"] = "somebody:evil"
    manifest.pop("seal")
    storage.write_json(place / "teacher.json", storage.sealed(manifest))
    assert damaged(place) == []
    assert [finding.what for finding in verify(place)] == ["teacher", "file of a teacher"]


def test_an_empty_folder_holds_nothing(tmp_path):
    with pytest.raises(BadArtifact, match="holds neither"):
        verify(tmp_path)


def test_inspect_tells_what_labels_and_teachers_are(labels, teachers, capsys):
    assert main(["inspect", str(labels)]) == 0
    said = capsys.readouterr().out
    assert "LabelSet(replayed, 9 images, 2 epochs" in said
    assert "training       batch_size = 4" in said
    assert "weight 0.5000" in said
    assert main(["inspect", str(labels), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["teacher_mode"] == "eval"
    assert main(["inspect", str(teachers)]) == 0
    said = capsys.readouterr().out
    assert "prior          70.0 %" in said
    assert "all files match their sha256" in said
    assert main(["inspect", str(teachers), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["teachers"]) == 2
    flip(labels / "epoch-00001.safetensors")
    assert main(["inspect", str(labels)]) == 6


def test_everything_in_a_folder_is_looked_at(source, tmp_path):
    made = make_set(source)
    made.save(tmp_path / "set")
    make_committee(source)[0].save(tmp_path / "set" / "teacher")
    assert damaged(tmp_path / "set") == []
    flip(tmp_path / "set" / "images.safetensors")
    assert damaged(tmp_path / "set") == ["images.safetensors"]


def test_the_records_of_a_study_are_read(source, tmp_path):
    studies.grid(source, "RandomReal", out=tmp_path, ipc=1, seeds=1, epochs=1, repeats=1, workers=1, devices="cpu")
    assert damaged(tmp_path) == []
    (tmp_path / "results.jsonl").write_text("nothing\nof the kind\n")
    (tmp_path / "study.json").write_text("{")
    assert damaged(tmp_path) == ["results.jsonl", "study.json"]


def test_two_teachers_of_one_name_are_no_committee(source, tmp_path):
    for place in ("a", "b"):
        make_committee(source)[0].save(tmp_path / place)
    (finding,) = [finding for finding in verify(tmp_path) if finding.problem]
    assert "two teachers share a name" in finding.problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "many"),
        ("epochs", 10**30),
        ("teachers", []),
        ("teachers", [1, 2]),
        ("weights", ["a", "b"]),
        ("weights", [0.9, 0.9]),
        ("weights", [1.0]),
        ("vote_temperature", "x"),
        ("teacher_mode", "zzz"),
        ("seed", None),
        ("recipe", [1]),
    ],
)
def test_headings_that_cannot_be_are_findings(key, value, labels):
    manifest = storage.read_json(labels / "labels.json")
    manifest[key] = value
    manifest.pop("seal")
    storage.write_json(labels / "labels.json", storage.sealed(manifest))
    assert damaged(labels) == ["."]
    assert main(["inspect", str(labels)]) == 6


@pytest.mark.parametrize("value", [None, [1], "resnet18", {"type": "NetworkSpec", "name": 3}])
def test_manifests_of_teachers_that_cannot_be_are_findings(value, teachers):
    place = next(place for place in teachers.iterdir() if place.is_dir())
    manifest = storage.read_json(place / "teacher.json")
    manifest["network"] = value
    manifest.pop("seal")
    storage.write_json(place / "teacher.json", storage.sealed(manifest))
    assert damaged(place) == ["."]


def test_labels_from_before_votes_were_recorded_are_read_where_all_were_alike(labels):
    manifest = storage.read_json(labels / "labels.json")
    manifest.pop("seal")
    manifest.pop("vote_temperature")
    storage.write_json(labels / "labels.json", storage.sealed(manifest))
    assert damaged(labels) == []
    manifest.pop("seal", None)
    manifest["weights"] = [0.4, 0.6]
    storage.write_json(labels / "labels.json", storage.sealed(manifest))
    (finding,) = [finding for finding in verify(labels) if finding.problem]
    assert "label the set anew" in finding.problem
