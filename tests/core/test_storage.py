import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsdistill.core import storage
from dsdistill.errors import BadArtifact, OutputConflict


@pytest.fixture
def folder(tmp_path):
    tensors = storage.encode_tensors({"a": torch.arange(6.0).reshape(2, 3)})
    storage.write_folder(tmp_path, {"t.safetensors": tensors, "note.txt": b"hello"}, "m.json", {"kind": "test"})
    return tmp_path


def read(folder):
    manifest = storage.read_manifest(folder / "m.json")
    return storage.read_listed_tensors(folder, manifest, "t.safetensors")


def test_round_trip(folder):
    assert torch.equal(read(folder)["a"], torch.arange(6.0).reshape(2, 3))
    assert storage.read_manifest(folder / "m.json")["files"]["note.txt"]["bytes"] == 5


def test_files_follow_the_umask_and_leave_no_temporaries(folder):
    old = os.umask(0o022)
    try:
        storage.write_bytes(folder / "x", b"1")
    finally:
        os.umask(old)
    assert (folder / "x").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in folder.iterdir()) == ["m.json", "note.txt", "t.safetensors", "x"]


def test_a_failed_write_keeps_the_old_file(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="bytes are needed"):
        storage.write_bytes(folder / "note.txt", b"new content")
    assert (folder / "note.txt").read_bytes() == b"hello"
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("position", [0, 8, 60, -1])
def test_a_flipped_bit_is_noticed(folder, position):
    data = bytearray((folder / "t.safetensors").read_bytes())
    data[position] ^= 1
    (folder / "t.safetensors").write_bytes(data)
    with pytest.raises(BadArtifact, match=r"t\.safetensors.*sha256"):
        read(folder)


def test_truncation_is_noticed(folder):
    data = (folder / "t.safetensors").read_bytes()
    (folder / "t.safetensors").write_bytes(data[:-3])
    with pytest.raises(BadArtifact, match=f"{len(data) - 3} bytes where the manifest says {len(data)}"):
        read(folder)


def test_a_missing_file_is_named(folder):
    (folder / "t.safetensors").unlink()
    with pytest.raises(BadArtifact, match=r"t\.safetensors: listed in the manifest but not readable"):
        read(folder)


def test_an_edited_manifest_is_noticed(folder):
    manifest = json.loads((folder / "m.json").read_text())
    manifest["kind"] = "other"
    (folder / "m.json").write_text(json.dumps(manifest))
    with pytest.raises(BadArtifact, match="seal"):
        storage.read_manifest(folder / "m.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b"null", b"[" * 100_000])
def test_anything_but_a_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(BadArtifact):
        storage.read_manifest(tmp_path / "m.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", ".."])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    manifest = storage.sealed({"files": {name: {"bytes": 1, "sha256": "x"}}})
    with pytest.raises(BadArtifact, match="outside the folder"):
        storage.read_listed(tmp_path, manifest, name)


def test_a_symbolic_link_is_not_followed(folder):
    (folder / "secret").write_bytes(b"hello")
    (folder / "note.txt").unlink()
    (folder / "note.txt").symlink_to(folder / "secret")
    with pytest.raises(BadArtifact, match="outside the folder"):
        storage.read_listed(folder, storage.read_manifest(folder / "m.json"), "note.txt")


def test_nan_and_foreign_bytes_are_refused(tmp_path):
    files = {"nan": storage.encode_tensors({"a": torch.tensor([1.0, math.nan])}), "junk": b"\x80\x04junk"}
    storage.write_folder(tmp_path, files, "m.json", {})
    manifest = storage.read_manifest(tmp_path / "m.json")
    with pytest.raises(BadArtifact, match="'a' holds NaN"):
        storage.read_listed_tensors(tmp_path, manifest, "nan")
    with pytest.raises(BadArtifact, match="pickles are never read"):
        storage.read_listed_tensors(tmp_path, manifest, "junk")


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputConflict, match="is a file"):
        storage.ensure_writable(tmp_path / "file")
    with pytest.raises(OutputConflict, match="cannot be written"):
        storage.ensure_writable(tmp_path / "file" / "below")


def test_a_path_that_can_be_no_folder_is_told_without_making_one(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(OutputConflict, match="file: is a file, a shelf is needed"):
            storage.require_folder(path, "a shelf")
    for path in (tmp_path, tmp_path / "new" / "one"):
        storage.require_folder(path, "a shelf")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5)
tensors = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
keys = st.text(max_size=4) | st.integers(0, 9)
trees = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@given(st.dictionaries(keys, trees, max_size=4))
def test_any_plain_tree_survives_flattening(tree):
    found, skeleton = storage.flatten(tree)
    assert same(storage.unflatten(found, json.loads(json.dumps(skeleton))), tree)


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TypeError, match="'a/b' has type object"):
        storage.flatten({"a": {"b": object()}})
