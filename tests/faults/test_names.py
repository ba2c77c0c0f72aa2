"""Names of folders and files that are hard on file systems, terminals and programs."""

import json
import os

import pytest
import torch

from dsdistill import SyntheticDataset, estimate, import_published, synthesize
from dsdistill.cli.main import main
from dsdistill.data import Normalization
from dsdistill.engine.verify import verify
from dsdistill.errors import BadArtifact, OutputConflict
from dsdistill.methods import RandomReal

ODD = {
    "spaces": " two  spaces ",
    "emoji": "\U0001f408 \u732b",
    "not UTF-8": os.fsdecode(b"caf\xe9 \xff"),
    "reserved on Windows": "aux.txt",
    "ends with a dot": "set.",
    "quotes": 'it\'s "x" $(true) `a` %41',
    "line break": "a\nb",
    "right to left": "\u202etes",
    "an option": "--out",
    "as long as they may be": "x" * 255,
    "deep": "/".join(["a" * 200] * 10),
}
IMPOSSIBLE = {"too long": "x" * 256, "zero byte": "a\0b", "half a pair": "\ud83d", "whole path too long": "a/" * 4000}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_any_name_that_the_system_takes_will_do(name, source, tmp_path, caplog):
    out = tmp_path / name
    made = synthesize(RandomReal(ipc=1), source, out=out)
    again = synthesize(RandomReal(ipc=1), source, out=out)
    loaded = SyntheticDataset.load(out)
    assert torch.equal(made.tensors()[0], loaded.tensors()[0])
    assert torch.equal(made.tensors()[0], again.tensors()[0])
    assert not [finding for finding in verify(out) if finding.problem]
    assert estimate(RandomReal(ipc=1), source, out=out / "new").free_disk > 0


@pytest.mark.parametrize("name", [ODD["not UTF-8"], ODD["emoji"], ODD["line break"]], ids=ascii)
def test_the_command_line_takes_them_too(name, tmp_path, capsys):
    out = str(tmp_path / name)
    command = ["synthesize", "--data", "digits", "--method", "RandomReal", "--method.ipc", "1", "--out", out]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == out
    assert main(["verify", out]) == 0
    assert main(["export", out, "--format", "npz"]) == 0
    assert main([*command, "--seed", "1"]) == 2
    capsys.readouterr().err.encode("utf-8")


@pytest.mark.parametrize("name", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_names_that_the_system_refuses_are_refused_in_words(name, source, tmp_path):
    made = synthesize(RandomReal(ipc=1), source)
    for write in (
        lambda: synthesize(RandomReal(ipc=1), source, out=tmp_path / name),
        lambda: made.save(tmp_path / name),
        lambda: made.export(tmp_path / name / "x", "npz"),
    ):
        with pytest.raises(OutputConflict, match="cannot be written"):
            write()
    statistics = Normalization((0.5,), (0.5,))
    for read in (
        lambda: SyntheticDataset.load(tmp_path / name),
        lambda: verify(tmp_path / name),
        lambda: import_published(tmp_path / name, normalization=statistics, classes=("a",)),
    ):
        with pytest.raises(BadArtifact):
            read()


def test_links_are_followed_to_folders_and_nowhere_else(source, tmp_path):
    made = synthesize(RandomReal(ipc=1), source)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    synthesize(RandomReal(ipc=1), source, out=tmp_path / "link" / "missing" / "parents")
    assert (tmp_path / "real" / "missing" / "parents" / "dataset.json").exists()
    SyntheticDataset.load(tmp_path / "link" / "missing" / "parents")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    for name in ("broken", "loop", "file", "file/below"):
        for write in (lambda out: synthesize(RandomReal(ipc=1), source, out=out), made.save):
            with pytest.raises(OutputConflict):
                write(tmp_path / name)
        for format in ("npz", "folder", "pt"):
            with pytest.raises(OutputConflict):
                made.export(tmp_path / name, format)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "broken").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_hub_cache_consists_of_links_and_is_read(source, tmp_path, monkeypatch):
    """Snapshots of huggingface_hub are folders of links to files named by their content."""
    hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    made = synthesize(RandomReal(ipc=1), source)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in made.save(tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **options: str(snapshot))
    fetched = SyntheticDataset.from_pretrained("somebody/some-set")
    assert torch.equal(fetched.tensors()[0], made.tensors()[0])
    (tmp_path / "blobs" / "labels.safetensors").write_bytes(b"")
    with pytest.raises(BadArtifact, match=r"labels\.safetensors"):
        SyntheticDataset.from_pretrained("somebody/some-set")
