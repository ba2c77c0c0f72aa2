import errno
import json
import os

import pytest

from dsdistill.errors import BadArtifact, OutOfSpace
from dsdistill.studies.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "results.jsonl")
    ledger.append({"key": "a", "status": "failed"})
    ledger.append({"key": "b", "status": "done", "text": "dög\udcff\n🐕"})
    return ledger


def test_lines_come_back_and_the_last_of_a_cell_counts(ledger):
    ledger.append({"key": "a", "status": "done"})
    assert [line["key"] for line in ledger.read()] == ["a", "b", "a"]
    assert {key: line["status"] for key, line in ledger.latest().items()} == {"a": "done", "b": "done"}
    assert ledger.latest()["b"]["text"] == "dög\udcff\n🐕"
    assert list(ledger.latest()) == ["a", "b"]
    assert len(ledger.path.read_bytes().splitlines()) == 3


def test_no_file_is_no_line(tmp_path):
    assert Ledger(tmp_path / "none").read() == []
    Ledger(tmp_path / "none").heal()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("torn", [b'{"schema_version": 1, "key": "c", "sta', b"\0\0\0", b'{"key": "c"}'])
def test_a_torn_last_line_is_dropped_and_healed(ledger, torn, caplog):
    whole = ledger.path.read_bytes()
    with ledger.path.open("ab") as file:
        file.write(torn)
    assert [line["key"] for line in ledger.read()] == ["a", "b"]
    assert "the last line is torn" in caplog.text
    assert ledger.path.read_bytes() == whole + torn  # a reader changes nothing
    ledger.heal()
    assert "removed" in caplog.text
    assert ledger.path.read_bytes() == whole
    ledger.append({"key": "c", "status": "done"})
    assert list(ledger.latest()) == ["a", "b", "c"]


def test_damage_elsewhere_is_named(ledger):
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    for bad, message in (
        (b"{]\n", "line 1 is damaged"),
        (b"[1]\n", "line 1 is no line of a study"),
        (b'{"key": "a"}\n', "line 1 is no line of a study"),
        (b'{"key": "a", "status": "done", "schema_version": 99}\n', "schema version 99, newer than 1"),
    ):
        ledger.path.write_bytes(bad + lines[1])
        with pytest.raises(BadArtifact, match=message):
            ledger.read()


@pytest.mark.parametrize("partly", [True, False])
def test_a_full_disk_leaves_the_file_as_it_was(ledger, monkeypatch, partly):
    whole, write = ledger.path.read_bytes(), os.write

    def full(descriptor, data):
        if partly:
            return write(descriptor, data[:7])
        write(descriptor, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutOfSpace, match=r"results\.jsonl"):
        ledger.append({"key": "c", "status": "done"})
    assert ledger.path.read_bytes() == whole


def test_a_line_is_one_write_that_reaches_the_disk(ledger, monkeypatch):
    calls, write, fsync = [], os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: calls.append("write") or write(*a))
    monkeypatch.setattr(os, "fsync", lambda *a: calls.append("fsync") or fsync(*a))
    ledger.append({"key": "c", "status": "done"})
    assert calls == ["write", "fsync"]
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.append({"key": "d", "status": "done", "loss": float("nan")})
    assert json.loads(ledger.path.read_bytes().splitlines()[-1])["key"] == "c"
