"""Files of experts: what is damaged or foreign is never used; only what is asked for is read."""

import shutil
from dataclasses import replace

import pytest
import torch
from methods.stepping import run_of
from safetensors.torch import load_file, save_file

from dsdistill.errors import BadArtifact
from dsdistill.experts import Experts, PlainTraining, Trajectories, shards
from dsdistill.networks import NetworkSpec

SMALL = NetworkSpec(width=4, depth=1)
EXPERTS = Experts(count=2, training=PlainTraining(epochs=3, batch_size=12, momentum=0.5))


def trajectories(source, tmp_path, experts=EXPERTS):
    return Trajectories(replace(run_of(source), store=tmp_path), experts, SMALL, 3)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def relabel(path, **about):
    """Tensors as they are, other metadata: its seal is that of the old ones."""
    with shards.safe_open(path, framework="pt") as file:
        known = file.metadata()
    save_file(load_file(path), path, metadata={**known, **about})


DAMAGE = {
    "a bit of a snapshot": lambda path: flip(path, -1000),
    "the last bit": lambda path: flip(path, -1),
    "a bit of the header": lambda path: flip(path, 20),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"x" * 1000),
    "another's": lambda path: shutil.copy(path.with_name(shards.file_name(0)), path),
    "epochs it does not have": lambda path: relabel(path, epochs="9"),
    "another buffer's": lambda path: relabel(path, buffer="0" * 16),
    "no seal": lambda path: save_file(load_file(path), path),
    "a later version": lambda path: relabel(path, version="2"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_file_is_made_again(what, source, tmp_path, caplog):
    made = trajectories(source, tmp_path)
    wanted = [made.snapshots(index, range(4)) for index in range(2)]
    path = made.folder / shards.file_name(1)
    DAMAGE[what](path)
    caplog.clear()
    again = trajectories(source, tmp_path)
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith(f"this expert is not used, and trained again: {path}")
    assert all(torch.equal(again.snapshots(index, range(4)), wanted[index]) for index in range(2))
    assert shards.check(path).epochs == 3


def test_a_whole_file_of_other_experts_is_not_used(source, tmp_path, caplog):
    made = trajectories(source, tmp_path)
    wanted = made.snapshots(1, range(4))
    other = trajectories(source, tmp_path, replace(EXPERTS, seed=1))
    shutil.copy(other.folder / shards.file_name(1), made.folder)
    caplog.clear()
    assert torch.equal(trajectories(source, tmp_path).snapshots(1, range(4)), wanted)
    assert f"is expert 1 of {other.folder.name}, put here by somebody" in caplog.text


def test_what_is_damaged_while_a_run_uses_it_is_refused(source, tmp_path):
    made = trajectories(source, tmp_path)
    flip(made.folder / shards.file_name(0), -1000)
    with pytest.raises(BadArtifact, match="altered or damaged"):
        made.snapshots(0, [1])
    (made.folder / shards.file_name(1)).unlink()
    with pytest.raises(BadArtifact, match=r"expert-0001.safetensors: is no whole file"):
        made.snapshots(1, [1])


def test_only_the_rows_asked_for_are_read(source, tmp_path, monkeypatch):
    made, read, opened = trajectories(source, tmp_path), [], shards.safe_open

    class Watched:
        def __init__(self, path, **more):
            self.file = opened(path, **more)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_slice(self, name):
            whole = self.file.get_slice(name)

            class Rows:
                def __getitem__(self, rows):
                    read.append((name, rows.start, rows.stop))
                    return whole[rows]

            return Rows()

    monkeypatch.setattr(shards, "safe_open", Watched)
    made.snapshots(1, [3, 1])
    assert read == [("snapshots", 3, 4), ("snapshots", 1, 2)]


def test_a_seal_is_compared_once_in_a_process(source, tmp_path, monkeypatch):
    made = trajectories(source, tmp_path)
    monkeypatch.setattr(shards, "_known", {})  # as another process begins
    examined, examine = [], shards._examined
    monkeypatch.setattr(shards, "_examined", lambda path: (examined.append(path.name), examine(path))[1])
    for _ in range(3):
        trajectories(source, tmp_path).snapshots(0, [1])
    assert examined == [shards.file_name(0), shards.file_name(1)]
    assert made.count == 2


def test_large_files_are_sealed_in_parts(source, tmp_path, monkeypatch):
    path = trajectories(source, tmp_path).folder / shards.file_name(0)
    monkeypatch.setattr(shards, "_known", {})
    monkeypatch.setattr(shards, "_PART", 1)  # one row at a time
    assert shards.check(path).epochs == 3


def test_the_size_of_a_file_is_known_beforehand(source, tmp_path):
    path = trajectories(source, tmp_path).folder / shards.file_name(0)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + shards.file_bytes(shards.read(path), 3)
