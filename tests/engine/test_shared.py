"""What jobs share: made once, found again, never half there."""

import os
import shutil
import signal
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dsdistill import synthesize
from dsdistill.core import storage
from dsdistill.engine import Job, PerClass, Rehearsal, Shared, State
from dsdistill.engine.verify import verify
from dsdistill.errors import OutOfSpace, Stopped


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is tested here


class Maker:
    """Counts how often it was asked."""

    def __init__(self, value=1.0):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"weights": torch.full((3,), self.value), "order": torch.arange(2)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def forbidden():
    raise AssertionError("it was there already")


def test_it_is_made_once_and_kept_in_memory():
    shared, make = Shared(), Maker()
    first = shared.get("a", make)
    assert shared.get("a", make) is first
    assert make.calls == 1
    assert same(shared.get("b", Maker(2.0)), Maker(2.0)())
    assert Shared().get("a", make) is not first  # of another run


@pytest.mark.parametrize("name", ["pool/3", "a b", "..%2Fx", "ä"])
def test_it_is_found_again_on_the_disk(name, tmp_path):
    place = tmp_path / "run" / "shared"
    first = Shared(place).get(name, Maker())
    assert same(Shared(place).get(name, forbidden), first)
    assert [path.parent for path in place.iterdir()] == [place]
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["shared.safetensors"]


def test_nothing_is_written_before_it_is_asked_for(tmp_path):
    Shared(tmp_path / "shared")
    assert not list(tmp_path.iterdir())


def spoil(place, damage):
    data = place / "shared.safetensors"
    if damage == "a bit":
        content = bytearray(data.read_bytes())
        content[-3] ^= 1
        data.write_bytes(content)
    elif damage == "the end":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "no tensors":
        data.unlink()
    elif damage == "no manifest":
        (place / "shared.json").unlink()
    elif damage == "another manifest":
        (place / "shared.json").write_text((place / "shared.json").read_text().replace('"name": "a"', '"name": "b"'))
    else:
        shutil.rmtree(place)
        place.write_text("a file where a folder was")


@pytest.mark.parametrize(
    "damage", ["a bit", "the end", "no tensors", "no manifest", "another manifest", "a file in its place"]
)
def test_what_is_damaged_is_made_again_with_a_warning(damage, tmp_path, caplog):
    Shared(tmp_path).get("a", Maker())
    spoil(tmp_path / "a", damage)
    make = Maker(2.0)
    assert same(Shared(tmp_path).get("a", make), make())
    assert make.calls == 2
    assert "'a' is discarded and made again" in caplog.text
    assert same(Shared(tmp_path).get("a", forbidden), make())  # and whole now


def test_a_maker_that_fails_leaves_nothing(tmp_path):
    shared = Shared(tmp_path / "shared")

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shared.get("a", broken)
    assert not list(tmp_path.iterdir())
    assert shared.get("a", Maker())


@pytest.mark.parametrize("where", ["tensors", "manifest", "rename"])
def test_a_write_cut_short_leaves_nothing_that_is_taken_for_whole(where, tmp_path, monkeypatch):
    place = {"tensors": "write_bytes", "manifest": "write_json", "rename": "fsync_folder"}[where]
    before = getattr(storage, place)

    def cut(path, *rest):
        if where == "rename" and path != tmp_path:
            return before(path, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, place, cut)
        with pytest.raises(KeyboardInterrupt):
            Shared(tmp_path).get("a", Maker())
    assert not list(tmp_path.glob("*.tmp"))
    make = Maker()
    assert same(Shared(tmp_path).get("a", make), Maker()())
    assert make.calls == (0 if where == "rename" else 1)  # once renamed, it is whole


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "shared.safetensors").write_bytes(b"half")
    assert same(Shared(tmp_path).get("a", Maker()), Maker()())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OutOfSpace):
        Shared(tmp_path / "shared").get("a", Maker())
    assert not list((tmp_path / "shared").iterdir())


def test_a_request_to_stop_comes_before_the_work_and_not_before_what_is_there(tmp_path):
    Shared(tmp_path).get("a", Maker())

    def give_way():
        raise Stopped(15, 0, tmp_path)

    shared = Shared(tmp_path, give_way)
    assert same(shared.get("a", forbidden), Maker()())
    with pytest.raises(Stopped):
        shared.get("b", forbidden)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_rehearsal_counts_its_bytes_once():
    rehearsal = Rehearsal()
    shared = Shared(rehearsal=rehearsal)
    for name in ("a", "a", "b"):
        shared.get(name, Maker())
    assert rehearsal.disk == 2 * (3 * 4 + 2 * 8)


# In a run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sharing(PerClass):
    """Makes two things before its first step; its jobs, one for each class, add them to their images."""

    paper: ClassVar[str] = "none"
    made: ClassVar[list] = []

    @property
    def steps(self):
        return 2

    def jobs(self, run):
        return [Job(f"class/{c}", (c,)) for c in run.classes]

    def prepare(self, run):
        for name in ("x", "y"):
            self._value(run, name)

    def _value(self, run, name):
        def make():
            self.made.append(name)
            return {"value": torch.rand((), generator=run.rng.scoped("").at(name))}

        return run.shared.get(name, make)["value"]

    def start(self, run, job):
        return State(*self.random_real(run))

    def step(self, run, state, iteration):
        state.images.pixels.data += self._value(run, "x") + self._value(run, "y")
        return {"loss": torch.tensor(0.0)}


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Sharing, "made", [])
    return Sharing.made


def test_all_jobs_of_a_run_share_and_the_finished_run_leaves_none_of_it(source, tmp_path, made):
    result = synthesize(Sharing(ipc=1), source, device="cpu", progress=False, out=tmp_path / "run")
    assert made == ["x", "y"]
    assert not (tmp_path / "run" / "run" / "shared").exists()
    assert not any(finding.problem for finding in verify(tmp_path / "run"))
    again = synthesize(Sharing(ipc=1), source, device="cpu", progress=False)
    assert torch.equal(result.images.pixels, again.images.pixels)


def test_an_interrupted_run_finds_it_and_verify_looks_at_it(source, tmp_path, made, caplog):
    whole = synthesize(Sharing(ipc=1), source, device="cpu", progress=False)
    made.clear()
    folder = tmp_path / "run"

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(Sharing(ipc=1), source, device="cpu", progress=False, out=folder, callback=stop)
    kept = folder / "run" / "shared"
    (kept / "z.tmp").mkdir()
    found = {finding.path.name: finding for finding in verify(folder) if finding.what == "what jobs share"}
    assert sorted(found) == ["x", "y"]
    assert not any(finding.problem for finding in found.values())
    spoil(kept / "y", "a bit")
    assert [finding.path.name for finding in verify(folder) if finding.problem] == ["y"]
    result = synthesize(Sharing(ipc=1), source, device="cpu", progress=False, out=folder)
    assert made == ["x", "y", "y"]
    assert "'y' is discarded" in caplog.text
    assert torch.equal(result.images.pixels, whole.images.pixels)


def test_a_run_started_afresh_makes_it_anew(source, tmp_path, made):
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(Sharing(ipc=1), source, seed=0, progress=False, device="cpu", out=tmp_path, callback=stop)
    fresh = synthesize(Sharing(ipc=1), source, seed=1, progress=False, device="cpu", out=tmp_path, overwrite=True)
    assert made == ["x", "y", "x", "y"]
    alone = synthesize(Sharing(ipc=1), source, seed=1, progress=False, device="cpu")
    assert torch.equal(fresh.images.pixels, alone.images.pixels)


def test_a_signal_during_the_preparation_stops_the_run_which_goes_on_later(source, tmp_path, made, monkeypatch):
    make = Sharing._value

    def interrupted(self, run, name):
        value = make(self, run, name)
        if made == ["x"]:
            signal.raise_signal(signal.SIGTERM)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(Sharing, "_value", interrupted)
        with pytest.raises(Stopped):
            synthesize(Sharing(ipc=1), source, device="cpu", progress=False, out=tmp_path)
    assert made == ["x"]
    result = synthesize(Sharing(ipc=1), source, device="cpu", progress=False, out=tmp_path)
    assert made == ["x", "y"]
    assert torch.equal(result.images.pixels, synthesize(Sharing(ipc=1), source, progress=False).images.pixels)
