"""Checkpoints, parts and records that are damaged, foreign, or of another make."""

import logging
from dataclasses import replace

import pytest
import torch
from faults import nursery
from toys import Wander

from dsdistill import recipe as recipes
from dsdistill import synthesize
from dsdistill.core import storage
from dsdistill.engine import checkpoint
from dsdistill.errors import BadArtifact


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(nursery.os, "fsync", lambda descriptor: None)


def stop_after(iteration, job="all"):
    def callback(event):
        if (event.job, event.iteration) == (job, iteration):
            raise KeyboardInterrupt

    return callback


@pytest.fixture
def cut(source, method, tmp_path):
    """The checkpoints of an interrupted run, the newest last."""
    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, out=tmp_path, checkpoint_every=2, callback=stop_after(6))
    return sorted((tmp_path / "run" / "jobs" / "all").iterdir())


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 1])
def test_a_bit_that_flips_anywhere_costs_one_interval(name, share, cut, source, method, tmp_path, caplog):
    data = bytearray((cut[-1] / name).read_bytes())
    data[int(share * (len(data) - 2))] ^= 4
    (cut[-1] / name).write_bytes(data)
    steps = []
    resumed = synthesize(method, source, out=tmp_path, callback=lambda event: steps.append(event.iteration))
    assert steps[0] == 4
    assert "checkpoint step_000000006 is discarded" in caplog.text
    assert torch.equal(resumed.tensors()[0], synthesize(method, source).tensors()[0])


def resealed(step, **changes):
    meta = storage.read_manifest(step / "state.json")
    meta = {key: value for key, value in (meta | changes).items() if value is not ...}
    storage.write_json(step / "state.json", storage.sealed(meta))


def nested(depth):
    skeleton = {"value": None}
    for _ in range(depth):
        skeleton = {"list": [[0, skeleton]]}
    return skeleton


@pytest.mark.parametrize(
    "changes",
    [
        {"state": ...},
        {"state": None},
        {"state": {"value": 1}},
        {"state": {"tensor": "nobody"}},
        {"state": {"list": 5}},
        {"state": {"float": "one"}},
        {"state": {"dict": [[[], {"value": 1}]]}},
        {"state": {}},
        {"state": nested(300)},
        {"iteration": ...},
        {"iteration": "6"},
        {"iteration": -1},
        {"iteration": True},
        {"files": None},
        {"files": []},
        {"schema_version": 2},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_sealed_checkpoint_that_describes_no_state_is_discarded(changes, cut, source, method, tmp_path, caplog):
    resealed(cut[-1], **changes)
    synthesize(method, source, out=tmp_path)
    assert "checkpoint step_000000006 is discarded" in caplog.text


def test_all_damaged_is_the_end_with_exit_code_6(cut, source, method, tmp_path):
    for step in cut:
        (step / "state.safetensors").write_bytes(b"")
    with pytest.raises(BadArtifact, match=r"no checkpoint is usable.*--overwrite") as caught:
        synthesize(method, source, out=tmp_path)
    assert caught.value.exit_code == 6


def wandering(source, folder, **options):
    return synthesize(Wander(one_job=True, ipc=1), source, out=folder, checkpoint_every=2, **options)


def of_images(tree):
    tree["images"]["pixels"] = tree["images"]["pixels"][:, :, :4].clone()


def of_fewer_images(tree):
    tree["images"]["pixels"] = tree["images"]["pixels"][:2].clone()


def of_a_module(tree):
    tree["extras"]["head"]["weight"] = torch.zeros(3, 3)


def of_a_tensor(tree):
    tree["extras"]["average"] = torch.zeros(1)  # would be repeated without a word


def of_no_extras(tree):
    del tree["extras"]["average"]


def of_another_optimizer(tree):
    tree["optimizers"]["labels"] = tree["optimizers"].pop("images")


def of_more_optimizers(tree):
    tree["optimizers"]["labels"] = {"state": {}, "param_groups": []}


def of_more_groups(tree):
    tree["optimizers"]["images"]["param_groups"] *= 2


def of_nothing(tree):
    tree.clear()


@pytest.mark.parametrize(
    "change",
    [
        of_images,
        of_fewer_images,
        of_a_module,
        of_a_tensor,
        of_no_extras,
        of_another_optimizer,
        of_more_optimizers,
        of_more_groups,
        of_nothing,
    ],
)
def test_a_whole_checkpoint_of_another_make_is_refused_in_words(change, source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        wandering(source, tmp_path, callback=stop_after(3))
    job = tmp_path / "run" / "jobs" / "all"
    iteration, tree = checkpoint.read_newest(job)
    change(tree)
    checkpoint.write(job, iteration, tree, keep=1)
    with pytest.raises(BadArtifact, match=r"jobs/all: the checkpoint does not fit Wander: .*--overwrite") as caught:
        wandering(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_beyond_the_end_is_refused(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        wandering(source, tmp_path, callback=stop_after(3))
    job = tmp_path / "run" / "jobs" / "all"
    checkpoint.write(job, 7, checkpoint.read_newest(job)[1], keep=1)
    with pytest.raises(BadArtifact, match="after 7 steps, and the method makes 6"):
        wandering(source, tmp_path)


@pytest.mark.parametrize("name", ["images.safetensors", "labels.safetensors", "dataset.json"])
def test_a_damaged_part_is_made_again(name, source, tmp_path, caplog):
    whole = synthesize(Wander(), source, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        synthesize(Wander(), source, out=tmp_path / "cut", callback=stop_after(2, "class/2"))
    part = tmp_path / "cut" / "run" / "jobs" / "class%2F0" / "part"
    data = bytearray((part / name).read_bytes())
    data[-9] ^= 1
    (part / name).write_bytes(data)
    jobs = set()
    resumed = synthesize(Wander(), source, out=tmp_path / "cut", callback=lambda event: jobs.add(event.job))
    assert jobs == {"class/0", "class/2"}
    assert "the part of job 'class/0' is discarded" in caplog.text
    assert torch.equal(whole.tensors()[0], resumed.tensors()[0])
    assert nursery.contents(tmp_path / "whole") == nursery.contents(tmp_path / "cut")


@pytest.mark.parametrize("record", [{}, {"method": {}}, {"notes": 5, "parents": []}, {"unknown": 1}], ids=str)
def test_a_sealed_record_that_is_none_is_refused(record, cut, source, method, tmp_path):
    storage.write_json(tmp_path / "run" / "run.json", storage.sealed(record))
    with pytest.raises(BadArtifact, match=r"run\.json: is no record of a run.*--overwrite"):
        synthesize(method, source, out=tmp_path)
    synthesize(method, source, out=tmp_path, overwrite=True)


@pytest.mark.parametrize("recipe", [..., None, [], {"method": {}}], ids=str)
def test_a_finished_set_without_a_recipe_is_no_run(recipe, source, method, tmp_path):
    synthesize(method, source, out=tmp_path)
    manifest = storage.read_manifest(tmp_path / "dataset.json")
    manifest = {key: value for key, value in (manifest | {"recipe": recipe}).items() if value is not ...}
    storage.write_json(tmp_path / "dataset.json", storage.sealed(manifest))
    with pytest.raises(BadArtifact, match=r"dataset\.json: is no record of a run"):
        synthesize(method, source, out=tmp_path)


def test_other_threads_and_versions_are_stated(cut, source, method, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    earlier = recipes.library_versions()["torch"]
    versions = {**recipes.library_versions(), "torch": "9.9.9"}
    monkeypatch.setattr(recipes, "library_versions", lambda: versions)
    made = synthesize(method, source, out=tmp_path)
    for stated in ("threads: 1 -> 64", f"torch: {earlier!r} -> '9.9.9'"):
        assert stated in made.recipe.notes[0]
        assert stated in caplog.text
    assert next(record for record in caplog.records if "threads" in record.message).levelno == logging.WARNING


def test_a_checkpoint_of_another_method_is_not_reached(cut, source, method, tmp_path):
    with pytest.raises(OSError, match=r"There: DM on 'toy'; asked for: Wander on 'toy'"):
        synthesize(Wander(), source, out=tmp_path)
    with pytest.raises(OSError, match=r"method\.lr_images: 1\.0 -> 2\.0"):
        synthesize(replace(method, lr_images=2), source, out=tmp_path)


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe\n", b"[1]\n", b'{"job": "all"}\n', b'{"iteration": 1}\n', b'{"job": "all", "iteration": "1"}\n', b"\n"],
)
def test_a_spoiled_line_of_the_log_is_dropped(line, cut, source, method, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + line)
    synthesize(method, source, out=tmp_path)
    assert len(log.read_bytes().splitlines()) == 8
    assert line not in log.read_bytes().splitlines(keepends=True)
