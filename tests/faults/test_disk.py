"""Disks that fill up at any moment, and folders that cannot be written."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import nursery

from dsdistill import SyntheticDataset, synthesize
from dsdistill.core import storage
from dsdistill.engine import checkpoint, observe
from dsdistill.errors import OutOfSpace, OutputConflict
from dsdistill.methods import RandomReal

GROWING = ("fsync", "mkdir", "rename", "replace")
"""What a full disk refuses."""


def private_mounts():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


mounting = pytest.mark.skipif(not private_mounts(), reason="the system allows no private mounts")


class Disk:
    """Counts what would grow the disk, and is full from operation ``full_at`` on."""

    def __init__(self, monkeypatch, number=errno.ENOSPC):
        self.count, self.full_at, self.number = 0, None, number
        for name in GROWING:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), name))

    def _watched(self, original, name):
        def operation(*arguments, **options):
            self.count += 1
            if self.full_at is not None and self.count > self.full_at:
                raise OSError(self.number, os.strerror(self.number))
            return None if name == "fsync" else original(*arguments, **options)

        return operation


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_run_whose_disk_fills_up_before_any_operation_goes_on_once_there_is_space(number, tmp_path, monkeypatch):
    disk = Disk(monkeypatch, number)
    nursery.run(tmp_path / "whole")
    expected = nursery.contents(tmp_path / "whole")
    for moment in range(0, disk.count, 5 if number == errno.ENOSPC else 29):
        out = tmp_path / str(moment)
        disk.count, disk.full_at = 0, moment
        with pytest.raises(OutOfSpace, match=r"\d+ bytes are needed and \d+ are free") as caught:
            nursery.run(out)
        assert caught.value.exit_code == 5
        assert not (out / "dataset.json").exists() or moment > 90  # only tidying up was left
        jobs = list((out / "run" / "jobs").glob("*"))
        disk.full_at = None
        found = [checkpoint.read_newest(job) for job in jobs]  # never damaged
        assert [path.name for path in out.rglob("*.tmp*") if path.name.startswith(".tmp-")] == []
        nursery.run(out)
        assert nursery.contents(out) == expected, (moment, found)
        assert nursery.left_behind(out) == []


def on_private_disks(folder, mounts, program):
    """Mount small file systems on folders of ``folder``, seen by a Python program alone; what it said."""
    command = " && ".join(
        f"mkdir {folder}/{name} && mount -t tmpfs -o {options} none {folder}/{name}" for name, options in mounts.items()
    )
    program = f"import os, sys\nfrom dsdistill.cli.main import main\nos.chdir({str(folder)!r})\n{program}"
    script = ["unshare", "-rm", "sh", "-c", f'{command} && exec "$@"', "-", sys.executable, "-c", program]
    done = subprocess.run(script, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@mounting
def test_exit_codes_on_a_full_a_fixed_and_a_crowded_disk(tmp_path):
    program = """
open("full/ballast", "wb").write(bytes(240_000))
command = "synthesize --data digits --method DM --method.ipc 1 --method.iterations 6 --method.real_batch 4"
command = f"{command} --method.network.width 4 --checkpoint_every 2 --device cpu --json --out".split()
assert main([*command, "full/out"]) == 5
assert not os.path.exists("full/out/dataset.json")
os.remove("full/ballast")
assert main([*command, "full/out"]) == 0
assert main(["verify", "full/out", "--json"]) == 0
assert main([*command, "fixed/out"]) == 2
assert main([*command, "crowded"]) == 5
"""
    done = on_private_disks(tmp_path, {"full": "size=256k", "fixed": "ro", "crowded": "nr_inodes=1"}, program)
    assert "OutOfSpace: full/out" in done.stderr
    assert "bytes are needed" in done.stderr
    assert "OutputConflict: fixed/out: cannot be written (Read-only file system)" in done.stderr
    assert "OutOfSpace: crowded" in done.stderr


def test_a_log_that_does_not_fit_names_itself_and_costs_no_step(source, method, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    appending = observe._appending
    opened = []

    def full(path):
        opened.append(path)
        return appending(Path("/dev/full"))

    with monkeypatch.context() as patch:
        patch.setattr(observe, "_appending", full)
        with pytest.raises(OutOfSpace, match=r"metrics\.jsonl: \d+ bytes are needed"):
            synthesize(method, source, out=tmp_path)
    assert opened == [tmp_path / "run" / "metrics.jsonl"]
    made = synthesize(method, source, out=tmp_path)
    assert torch.equal(made.tensors()[0], synthesize(method, source).tensors()[0])


@pytest.fixture
def made(source):
    return synthesize(RandomReal(ipc=1), source)


@pytest.mark.parametrize("format", ["folder", "npz", "pt"])
def test_an_export_to_a_full_disk_leaves_nothing(format, made, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    made.export(tmp_path / "whole", format)
    whole = sorted(path.name for path in (tmp_path / "whole").rglob("*"))
    for moment in range(0, disk.count - 1, 2):  # the last is the fsync of a folder whose content is there
        disk.count, disk.full_at = 0, moment
        with pytest.raises(OutOfSpace, match="bytes are needed"):
            made.export(tmp_path / "out", format)
        disk.full_at = None
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
        disk.count = 0
    made.export(tmp_path / "out", format)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == whole


def test_a_set_on_a_full_disk_can_be_saved_again(made, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    made.save(tmp_path / "whole")
    for moment in range(1, disk.count - 1):
        disk.count, disk.full_at = 0, moment
        out = tmp_path / str(moment)
        with pytest.raises(OutOfSpace):
            made.save(out)
        assert not (out / "dataset.json").exists()
        disk.full_at = None
        made.save(out)
        assert nursery.contents(out) == nursery.contents(tmp_path / "whole")


def test_a_file_larger_than_allowed_names_the_limit(tmp_path):
    """`ulimit -f`: the system's EFBIG, met while a set is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "file").write_bytes(b"before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutOfSpace, match="9000 bytes are needed and 4096 are free"):
            storage.write_bytes(tmp_path / "file", b"x" * 9000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_run_that_goes_on_needs_no_room_for_what_it_has(source, method, tmp_path, monkeypatch):
    def stop(event):
        if event.iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=tmp_path, checkpoint_every=1, callback=stop)
    needed = []
    monkeypatch.setattr(storage, "require_space", lambda folder, count: needed.append(count))
    synthesize(method, source, out=tmp_path / "afresh")
    synthesize(method, source, out=tmp_path)
    afresh, onward = needed
    assert onward < 0.6 * afresh


def test_a_set_that_was_there_is_whole_after_a_refusal(made, tmp_path):
    made.save(tmp_path / "set")
    before = nursery.contents(tmp_path / "set")
    with pytest.raises(OutputConflict):
        made.save(tmp_path / "set")
    assert nursery.contents(tmp_path / "set") == before
    assert isinstance(SyntheticDataset.load(tmp_path / "set"), SyntheticDataset)
