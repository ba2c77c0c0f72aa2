"""Files made to harm: each is refused by name, quickly, and nothing in it is executed."""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch

from dsdistill import SyntheticDataset, import_published, synthesize
from dsdistill.cli.main import main
from dsdistill.core import storage
from dsdistill.data import Normalization
from dsdistill.engine.verify import verify
from dsdistill.errors import BadArtifact, BadData
from dsdistill.methods import RandomReal


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def saved(source, tmp_path):
    return synthesize(RandomReal(ipc=1), source).save(tmp_path / "set")


def refused(folder, message="."):
    """Both readers of sets refuse it in the same words."""
    with pytest.raises(BadArtifact, match=message) as caught:
        SyntheticDataset.load(folder)
    assert caught.value.exit_code == 6
    problems = [finding.problem for finding in verify(folder) if finding.problem]
    assert problems
    return caught.value


def manifest_of(folder):
    return json.loads((folder / "dataset.json").read_bytes())


def rewrite(folder, text):
    """Put a manifest there whose seal is valid for what a lenient reader sees in it."""
    seal = storage.sealed(json.loads(text))["seal"]
    (folder / "dataset.json").write_text(text.rstrip()[:-1] + f', "seal": "{seal}"}}')


# Configurations -----------------------------------------------------------------------------------------------


def laughs(levels):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), "aliases .* are not read"),
        ("method:\n  init_args: &a {ipc: 1}\n  more: *a", "aliases"),
        ("seed: &a [*a]", "aliases"),
        ("seed: " + "[" * 3000 + "]" * 3000, "nested deeper than 50"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested deeper than 50"),
        ("\n".join(" " * n + "a:" for n in range(300)), "nested deeper than 50"),
        ("seed: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
        ("seed: !!python/name:os.system", "could not determine a constructor"),
        ("!!python/object/new:os.system ['touch canary']", "could not determine a constructor"),
        ("seed: " + "9" * 5000, "."),
        ("\x00", "."),
        ("seed: 1\nseed: [1]", "."),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_hostile_configuration_costs_a_line(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["synthesize", "--config", "run.yaml", "--data", "digits", "--method", "RandomReal", "--out", "out"])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert len(said) < 2000 + len(text)
    assert re.search(message, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


# Manifests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused_though_the_seal_matches(constant, saved):
    manifest = manifest_of(saved)
    del manifest["seal"]
    rewrite(saved, json.dumps(manifest).replace('"seed": 0', f'"seed": {constant}'))
    refused(saved, f"not readable as JSON .*{constant} is no number")


def test_a_key_that_is_there_twice_is_refused_though_the_seal_matches(saved):
    manifest = manifest_of(saved)
    del manifest["seal"]
    rewrite(saved, json.dumps(manifest).replace('"seed": 0', '"seed": 1, "seed": 0'))
    refused(saved, "'seed' is there twice")


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [80, 300, 900, 50_000])
def test_deep_nesting_is_refused_or_harmless(levels, saved):
    text = json.dumps(manifest_of(saved))
    (saved / "dataset.json").write_text(text.replace('"seed": 0', f'"seed": {"[" * levels}0{"]" * levels}'))
    refused(saved)
    if levels < 900:  # with a valid seal
        recipe = {**manifest_of_text(text)["recipe"], "execution": {"deep": deep(levels)}}
        (saved / "dataset.json").write_text(json.dumps(storage.sealed({**manifest_of_text(text), "recipe": recipe})))
        try:
            SyntheticDataset.load(saved)
        except BadArtifact:
            assert levels > 80


def manifest_of_text(text):
    return json.loads(text)


HUGE = 10**4000


@pytest.mark.parametrize(
    "changes",
    [
        {"label_settings": {"num_classes": HUGE}},
        {"label_settings": {"num_classes": 10**15}, "classes": ["a"]},
        {"label_settings": {"num_classes": -1}},
        {"label_settings": {"num_classes": True}},
        {"normalization": {"kind": "standardize", "mean": [HUGE] * 3, "std": [1.0] * 3}},
        {"normalization": {"kind": "standardize", "mean": [0.0] * 3, "std": [HUGE] * 3}},
        {"normalization": {"kind": "zca", "mean": [0.0] * 3, "std": [1.0] * 3, "shape": [HUGE] * 3}},
        {"normalization": {"kind": "zca", "mean": [0.0] * 3, "std": [1.0] * 3, "shape": [3, 10**6, 10**6]}},
        {"count": HUGE},
        {"schema_version": HUGE},
        {"schema_version": 0},
        {"schema_version": -1},
        {"schema_version": True},
        {"form": "mirrored", "form_settings": {"base": "mirrored", "base_settings": {}}},
        {"form": {}, "label_kind": []},
        {"classes": {"0": "a", "1": "b", "2": "c"}},
        {"classes": [1, 2, 3]},
        {"classes": "abc"},
        {"files": [1]},
        {"bytes": None},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_sealed_manifests_with_absurd_entries_are_refused(changes, saved):
    content = storage.sealed({**manifest_of(saved), **changes})
    (saved / "dataset.json").write_text(json.dumps(content))
    refused(saved)


@pytest.mark.parametrize(
    "name", ["../secret", "{folder}/secret", "..", ".", "", "a/b", "./images", "x" * 300, "a\0b", "\ud83d", "\u202e"]
)
def test_a_manifest_lists_only_files_beside_it(name, saved, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    name = name.format(folder=tmp_path)
    entry = {"bytes": 1, "sha256": storage.sha256(b"x")}
    manifest = {"files": {name: entry}}
    with pytest.raises(BadArtifact):
        storage.read_listed(saved, manifest, name)
    content = storage.sealed({**manifest_of(saved), "files": {**manifest_of(saved)["files"], name: entry}})
    (saved / "dataset.json").write_text(json.dumps(content))
    assert len([finding for finding in verify(saved) if finding.problem]) == 1


@pytest.mark.parametrize("name", ["images.safetensors", "labels.safetensors", "dataset.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless link", "folder"])
def test_what_is_no_file_is_not_waited_for(name, kind, saved):
    if name != "dataset.json":
        files = manifest_of(saved)["files"]
        files[name] = {"bytes": 0, "sha256": storage.sha256(b"")}
        (saved / "dataset.json").write_text(json.dumps(storage.sealed({**manifest_of(saved), "files": files})))
    (saved / name).unlink()
    if kind == "pipe":
        os.mkfifo(saved / name)
    elif kind == "folder":
        (saved / name).mkdir()
    else:
        (saved / name).symlink_to("/dev/zero")
    refused(saved, name.partition(".")[0])


def test_a_folder_that_is_a_link_is_read_and_its_linked_files_are_not(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    SyntheticDataset.load(tmp_path / "link")
    (saved / "images.safetensors").rename(tmp_path / "elsewhere")
    (saved / "images.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(saved, "points outside the folder")


@pytest.mark.parametrize("size", [10**18, -1, HUGE, "5", None, 1e3])
def test_declared_sizes_are_never_believed(size, saved):
    files = manifest_of(saved)["files"]
    files["images.safetensors"]["bytes"] = size
    (saved / "dataset.json").write_text(json.dumps(storage.sealed({**manifest_of(saved), "files": files})))
    refused(saved, r"images\.safetensors: holds \d+ bytes where the manifest says")


def test_a_manifest_of_a_gigabyte_is_not_read(saved):
    os.truncate(saved / "dataset.json", 2**30)
    refused(saved, "larger than")


# Tensors ------------------------------------------------------------------------------------------------------


def tensor_file(header, payload):
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + payload


ENTRY = '{"dtype":"F32","shape":[3,3,8,8],"data_offsets":[0,2304]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor_file('{"pixels":' + ENTRY + ',"pixels":' + ENTRY + "}", bytes(2304)), "'pixels' is there twice"),
        (tensor_file('{"pixels":' + ENTRY.replace("3,3", "4,3") + "}", bytes(2304)), "not a valid safetensors"),
        (tensor_file('{"pixels":' + ENTRY.replace("2304", "9999") + "}", bytes(2304)), "not a valid safetensors"),
        (tensor_file('{"pixels":' + ENTRY + "}", bytes(2305)), "not a valid safetensors"),
        (tensor_file('{"pixels":' + ENTRY.replace("3,3", "99999999999,9999999999") + "}", bytes(2304)), "not a valid"),
        (struct.pack("<Q", 2**62) + b"{}", "not a valid safetensors"),
        (struct.pack("<Q", 2**32) + b"{}", "not a valid safetensors"),
        (tensor_file('{"a":' * 5000, b""), "not a valid safetensors"),
        (tensor_file(b"\xff\xfe", b""), "not a valid safetensors"),
        (b"\x80\x04\x95", "not a valid safetensors"),
        (b"", "not a valid safetensors"),
        (tensor_file('{"pixels":' + ENTRY + "}", b"\xff" * 2304), "'pixels' holds NaN"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_tensor_files_that_lie_are_refused_though_the_hash_matches(content, message, saved):
    (saved / "images.safetensors").write_bytes(content)
    files = manifest_of(saved)["files"]
    files["images.safetensors"] = {"bytes": len(content), "sha256": storage.sha256(content)}
    (saved / "dataset.json").write_text(json.dumps(storage.sealed({**manifest_of(saved), "files": files})))
    refused(saved, message)


@pytest.mark.parametrize(
    "content",
    [
        lambda: [torch.zeros(1).expand(10**9, 3, 32, 32), torch.zeros(1, dtype=torch.int64).expand(10**9)],
        lambda: [torch.zeros(2, 3, 4, 4), torch.zeros(1).expand(2, 10**12)],
        lambda: [torch.zeros(2, 3, 4, 4).to_sparse(), torch.zeros(2, dtype=torch.int64)],
        lambda: [torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, dtype=torch.int64)],
    ],
    ids=["images", "labels", "sparse", "meta"],
)
def test_a_small_file_that_claims_a_huge_tensor_is_refused(content, tmp_path):
    torch.save(content(), tmp_path / "set.pt")
    with pytest.raises((BadArtifact, BadData), match=r"set\.pt"):
        import_published(tmp_path / "set.pt", normalization=Normalization((0.5,) * 3, (0.5,) * 3), classes=("a", "b"))
