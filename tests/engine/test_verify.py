import json
import os
import shutil

import pytest

from dsdistill import synthesize
from dsdistill.core import storage
from dsdistill.engine.verify import verify
from dsdistill.errors import BadArtifact
from dsdistill.methods import RandomReal
from dsdistill.synthetic import SyntheticDataset


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is tested here


@pytest.fixture
def saved(source, tmp_path):
    synthesize(RandomReal(ipc=1), source, out=tmp_path / "set")
    return tmp_path / "set"


def damaged(folder):
    return [finding.path.relative_to(folder).as_posix() for finding in verify(folder) if finding.problem]


def flip(path, position=-5):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_whole_set_is_found_whole(saved):
    findings = verify(saved)
    names = [finding.path.name for finding in findings]
    assert names == [
        "dataset.json",
        "images.safetensors",
        "labels.safetensors",
        "grid.png",
        "README.md",
        "set",
        "run.json",
    ]
    assert not damaged(saved)


@pytest.mark.parametrize("name", ["images.safetensors", "labels.safetensors", "grid.png", "README.md", "dataset.json"])
@pytest.mark.parametrize("damage", ["a bit", "the end", "all of it"])
def test_every_file_counts(name, damage, saved):
    path = saved / name
    if damage == "a bit":
        flip(path)
    elif damage == "the end":
        path.write_bytes(path.read_bytes()[:-2])
    elif name == "dataset.json":
        path.write_text("{}")
    else:
        path.unlink()
    assert damaged(saved) == [name]


def test_files_that_are_whole_but_do_not_fit_each_other(saved):
    manifest = json.loads((saved / "dataset.json").read_text())
    (saved / "dataset.json").write_bytes(storage.encode_json(storage.sealed({**manifest, "ipc": 7})))
    assert damaged(saved) == ["."]


def test_a_manifest_cannot_point_outside(saved, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = json.loads((saved / "dataset.json").read_text())
    for name in ("../secret", str(secret)):
        files = {name: {"bytes": 1, "sha256": storage.sha256(b"x")}}
        (saved / "dataset.json").write_bytes(storage.encode_json(storage.sealed({**manifest, "files": files})))
        (finding,) = [finding for finding in verify(saved) if finding.what == "file of the set"]
        assert "outside the folder" in finding.problem


def test_checkpoints_of_an_interrupted_run(source, method, tmp_path):
    def stop(event):
        if event.iteration == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=tmp_path / "run", checkpoint_every=2, callback=stop)
    steps = sorted((tmp_path / "run" / "run" / "jobs" / "all").glob("step_*"))
    assert [finding.what for finding in verify(tmp_path / "run")] == ["record of the run", "checkpoint", "checkpoint"]
    shutil.copytree(steps[0], steps[0].with_name("step_000000099.tmp"))  # half-written: nobody will read it
    flip(steps[1] / "state.safetensors")
    assert damaged(tmp_path / "run") == [f"run/jobs/all/{steps[1].name}"]
    flip(tmp_path / "run" / "run" / "run.json", 40)
    assert len(damaged(tmp_path / "run")) == 2


def test_nothing_of_ours_is_an_error(tmp_path):
    (tmp_path / "photo.jpg").write_text("x")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadArtifact, match="neither a synthetic set"):
            verify(path)


def test_the_set_alone_without_its_run(saved):
    shutil.rmtree(saved / "run")
    assert not damaged(saved)
    assert isinstance(SyntheticDataset.load(saved), SyntheticDataset)


def test_a_set_whose_manifest_is_gone_is_no_whole_set(saved):
    (saved / "dataset.json").unlink()
    assert damaged(saved) == ["dataset.json"]


def test_a_study_is_checked_cell_by_cell(source, tmp_path):
    for name in ("a", "b"):
        synthesize(RandomReal(ipc=1), source, out=tmp_path / "cells" / name)
    assert len(verify(tmp_path)) == 14
    flip(tmp_path / "cells" / "b" / "grid.png")
    assert damaged(tmp_path) == ["cells/b/grid.png"]
