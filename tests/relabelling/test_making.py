"""`relabel` itself: repeatable, resumable, refusing early."""

import os
import re
import signal
from dataclasses import replace

import filelock
import pytest
import torch
from relabelling.makers import CUT, make_committee, make_set

from dsdistill.augmentations import Siamese
from dsdistill.core import storage
from dsdistill.errors import (
    BadData,
    DeviceUnavailable,
    InvalidSetting,
    OutOfMemory,
    OutOfSpace,
    OutputConflict,
    OutputLocked,
    Stopped,
    UnknownName,
)
from dsdistill.evaluation import get_protocol
from dsdistill.experts import Committee
from dsdistill.relabelling import FerKD, LabelSet, TopK, estimate_labels, relabel
from dsdistill.relabelling.labeller import Labeller
from dsdistill.relabelling.record import EpochRecord


@pytest.fixture
def made(source):
    return make_set(source)


@pytest.fixture
def committee(source):
    return make_committee(source)


@pytest.fixture
def begun(monkeypatch):
    """Numbers of the epochs that were labelled."""
    numbers, epoch = [], Labeller.made

    def watched(self, number):
        numbers.append(number)
        return epoch(self, number)

    monkeypatch.setattr(Labeller, "made", watched)
    return numbers


def label(made, committee, recipe=CUT, **options):
    return relabel(made, committee, recipe, **{"device": "cpu", "progress": False, **options})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(made, committee, tmp_path):
    for name, options in [("a", {}), ("b", {}), ("c", {"seed": 1})]:
        label(made, committee, out=tmp_path / name, **options)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    mine, other = content(tmp_path / "a"), content(tmp_path / "c")
    assert all(mine[name] != other[name] for name in mine)
    held = label(made, committee)
    assert held.save(tmp_path / "d")
    assert content(tmp_path / "d") == mine


def test_fewer_epochs_are_the_first_ones(made, committee, tmp_path):
    label(made, committee, out=tmp_path / "three")
    label(made, committee, epochs=2, out=tmp_path / "two")
    three, two = content(tmp_path / "three"), content(tmp_path / "two")
    assert all(two[name] == three[name] for name in two if name.startswith("epoch"))


def test_an_interrupted_call_goes_on_at_the_first_missing_epoch(made, committee, tmp_path, begun, monkeypatch):
    epoch = Labeller.made

    def signalled(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return epoch(self, number)

    monkeypatch.setattr(Labeller, "made", signalled)
    with pytest.raises(Stopped) as caught:
        label(made, committee, out=tmp_path / "labels")
    assert (caught.value.signum, caught.value.iteration, caught.value.exit_code) == (signal.SIGTERM, 2, 143)
    assert sorted(content(tmp_path / "labels")) == [
        "epoch-00000.safetensors",
        "epoch-00001.safetensors",
        "growing.json",
    ]
    monkeypatch.setattr(Labeller, "made", epoch)
    begun.clear()
    label(made, committee, out=tmp_path / "labels")
    assert begun == [2]
    label(made, committee, out=tmp_path / "whole")
    assert content(tmp_path / "labels") == content(tmp_path / "whole")
    begun.clear()
    label(made, committee, out=tmp_path / "labels")
    assert begun == []


def test_a_file_that_was_written_but_not_listed_is_made_again(made, committee, tmp_path, monkeypatch):
    write, wrong = storage.write_json, []

    def killed(path, content):
        if len(content["files"]) == 2 and not wrong:
            wrong.append(path)
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(storage, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        label(made, committee, out=tmp_path / "labels")
    monkeypatch.undo()
    label(made, committee, out=tmp_path / "labels")
    label(made, committee, out=tmp_path / "whole")
    assert content(tmp_path / "labels") == content(tmp_path / "whole")


def test_a_damaged_file_is_made_again_by_the_same_call(made, committee, tmp_path, begun, caplog):
    label(made, committee, out=tmp_path / "labels")
    whole = content(tmp_path / "labels")
    (tmp_path / "labels" / "epoch-00001.safetensors").write_bytes(b"x" * 10)
    begun.clear()
    label(made, committee, out=tmp_path / "labels").verify()
    assert begun == [1]
    assert "epoch-00001.safetensors: holds 10 bytes" in caplog.text
    assert content(tmp_path / "labels") == whole


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"epochs": 2}, "recipe, epochs"),
        ({"codec": "uint8"}, "codec"),
        ({"temperature": 5.0}, "weights, vote_temperature"),
    ],
)
def test_labels_of_another_make_are_not_continued(options, what, made, committee, tmp_path, begun):
    label(made, committee, out=tmp_path / "labels")
    before = content(tmp_path / "labels")
    begun.clear()
    with pytest.raises(OutputConflict, match=f"holds labels that differ in {what};"):
        label(made, committee, out=tmp_path / "labels", **options)
    assert begun == []
    assert content(tmp_path / "labels") == before


def test_labels_that_go_on_elsewhere_are_told_apart(made, committee, tmp_path, caplog):
    label(made, committee, out=tmp_path / "labels", chunk=8)
    (tmp_path / "labels" / "epoch-00001.safetensors").unlink()
    label(made, committee, out=tmp_path / "labels", chunk=8)
    assert "last bits" not in caplog.text
    (tmp_path / "labels" / "epoch-00001.safetensors").unlink()
    labels = label(made, committee, out=tmp_path / "labels", chunk=4)
    assert "were made with chunk 8, now 4: what is added may differ in the last bits" in caplog.text
    assert labels.heading.execution["chunk"] == 8


def test_a_protocols_vote_is_taken_unless_another_is_asked_for(made, committee):
    voting = replace(get_protocol("cvdd"), epochs=1)
    for recipe, options, temperature in [
        (voting, {}, 10.0),
        (voting, {"temperature": 3.0}, 3.0),
        (voting, {"kind": "static"}, 10.0),
    ]:
        weights = label(made, committee, recipe, **options).heading.weights
        assert weights == tuple(committee.weights(temperature).tolist())
        assert weights[0] < weights[1]
    for recipe in (replace(voting, vote_temperature=None), CUT):
        assert label(made, committee, recipe).heading.weights == (0.5, 0.5)


def test_a_vote_needs_the_priors_of_several(made, committee, begun):
    unknown = Committee([committee[0], replace(committee[1], performance=None)])
    voting = replace(get_protocol("cvdd"), epochs=1)
    with pytest.raises(InvalidSetting, match=r"of teacher1 is unknown.*dsdistill prior.*vote_temperature=None.*equal"):
        label(made, unknown, voting)
    assert begun == []
    alone = label(made, Committee([replace(committee[0], performance=None)]), voting)
    assert alone.heading.weights == (1.0,)


def test_folders_of_others_are_left_alone(made, committee, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputConflict, match="is not empty and holds no labels"):
        label(made, committee, out=tmp_path)
    label(made, committee, out=tmp_path / "labels")
    with filelock.FileLock(tmp_path / "labels" / "lock"), pytest.raises(OutputLocked):
        label(made, committee, out=tmp_path / "labels")


def test_a_disk_that_is_too_small_is_noticed_before(made, committee, tmp_path, begun, monkeypatch):
    needed = label(made, committee).nbytes
    begun.clear()
    monkeypatch.setattr(storage, "free_space", lambda folder: needed - 1)
    with pytest.raises(OutOfSpace, match=f"{needed} bytes are needed and {needed - 1} are free"):
        label(made, committee, out=tmp_path / "labels")
    assert begun == []
    monkeypatch.setattr(storage, "free_space", lambda folder: needed)
    assert label(made, committee, out=tmp_path / "labels").nbytes == needed


def test_memory_that_runs_out_halves_what_passes(made, committee, monkeypatch, caplog):
    asked, logits = [], Committee.logits

    def hungry(self, images, *arguments, **options):
        asked.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self, images, *arguments, **options)

    monkeypatch.setattr(Labeller, "tell", lambda *_: None)
    monkeypatch.setattr(Committee, "logits", hungry)
    limit = 4
    labels = label(made, committee, codec="float32", epochs=1)
    assert asked == [8, 4, 4, 1]
    assert "4 images pass at a time" in caplog.text
    limit = 100
    other = label(made, committee, codec="float32", epochs=1, chunk=1)
    for mine, theirs in zip(labels.lessons(made)(0), other.lessons(made)(0), strict=True):
        assert torch.equal(mine.targets, theirs.targets)
    limit = 3
    with pytest.raises(OutOfMemory, match="labelling: out of memory with 4 images"):
        label(made, committee, epochs=1)


def test_one_epoch_is_in_memory_at_a_time(made, committee, tmp_path, monkeypatch):
    alive, most, draw = [0], [0], EpochRecord.draw

    class Counted(EpochRecord):
        def __del__(self):
            alive[0] -= 1

    def counted(*arguments):
        made = draw(*arguments)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return Counted(**vars(made))

    monkeypatch.setattr(EpochRecord, "draw", counted)
    label(made, committee, epochs=6, out=tmp_path / "labels")
    assert most[0] <= 2


def test_what_it_costs_is_told_without_writing(made, committee, tmp_path):
    cost = estimate_labels(made, committee, CUT, epochs=50, device="cpu", out=tmp_path / "labels")
    assert not (tmp_path / "labels").exists()
    assert cost.disk == label(made, committee, epochs=50).nbytes
    assert 0 < cost.seconds < 60
    text = str(cost)
    assert text.startswith("replayed labels of 9 images, 50 times, on cpu:\n  time    ")
    assert " free" in text
    static = estimate_labels(made, committee, None, kind="static", device="cpu")
    assert (static.epochs, static.free_disk) == (1, None)
    assert static.disk == label(made, committee, None, kind="static").nbytes


def test_the_log_tells_bytes_and_time(made, committee, caplog):
    caplog.set_level("INFO")
    label(made, committee)
    assert re.search(r"replayed labels by teacher0, teacher1: 0\.0 MiB, about \d+\.\d s", caplog.text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "soft"}, InvalidSetting, "kind = 'soft'"),
        ({"codec": "float8"}, UnknownName, "unknown codec 'float8'"),
        ({"codec": TopK(k=4)}, InvalidSetting, "at most 3, the number of classes"),
        ({"codec": "topk"}, InvalidSetting, "TopK.k = 10"),
        ({"epochs": 0}, InvalidSetting, "epochs = 0"),
        ({"epochs": 1.5}, InvalidSetting, "epochs = 1.5"),
        ({"chunk": 0}, InvalidSetting, "chunk = 0"),
        ({"seed": "0"}, InvalidSetting, "seed = '0'"),
        ({"device": "cuda:99"}, DeviceUnavailable, "cuda:99"),
        ({"teacher_mode": "train"}, InvalidSetting, "teacher_mode = 'train'"),
        ({"temperature": 0.0}, InvalidSetting, "temperature = 0.0"),
        ({"recipe": None}, InvalidSetting, "recipe = None"),
        ({"recipe": 3}, InvalidSetting, "recipe = 3"),
        ({"recipe": "cvd"}, UnknownName, "did you mean 'cvdd'"),
        ({"recipe": replace(CUT, augmentation=Siamese())}, InvalidSetting, "ResizedCrop and PadCrop"),
        ({"calibration": FerKD()}, InvalidSetting, "mix = CutMix.* none beside a calibration"),
        (
            {"calibration": FerKD(), "teacher_mode": "batch", "recipe": replace(CUT, mix=None)},
            InvalidSetting,
            "teacher_mode = 'batch' .*'eval' beside a calibration",
        ),
        ({"recipe": get_protocol("ufc_static")}, InvalidSetting, "kind = 'replayed' .*'static'"),
        ({"kind": "static", "recipe": None, "epochs": 3}, InvalidSetting, "static labels are made once"),
        ({"kind": "distances", "codec": "uint8"}, InvalidSetting, "distances are stored as float32 or float16"),
        ({"kind": "distances", "recipe": replace(CUT, mix=None)}, InvalidSetting, "a recipe that mixes"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, message, made, committee, tmp_path, begun):
    with pytest.raises(error, match=message):
        label(made, committee, **{"out": tmp_path / "labels", **options})
    assert begun == []
    assert not (tmp_path / "labels").exists()


def test_arguments_of_another_type_are_told_what_to_be(made, committee):
    with pytest.raises(InvalidSetting, match=r"synthetic = .*SyntheticDataset.load"):
        label("runs/dm", committee)
    with pytest.raises(InvalidSetting, match=r"committee = .*Committee.load"):
        label(made, "teachers")


def test_teachers_that_say_nothing_are_noticed(made, committee):
    with torch.no_grad():
        next(committee[0].network.parameters()).fill_(torch.nan)
    with pytest.raises(BadData, match="logits are not finite"):
        label(made, committee)


def test_labels_can_be_opened_meanwhile_only_when_finished(made, committee, tmp_path):
    from dsdistill.errors import BadArtifact

    (tmp_path / "labels").mkdir()
    with pytest.raises(BadArtifact, match="not a finished"):
        LabelSet.load(tmp_path / "labels")


def test_a_protocol_may_be_named(made, committee):
    few = {"epochs": 1, "device": "cpu", "progress": False}
    named, given = (relabel(made, committee, recipe, **few) for recipe in ("cvdd", get_protocol("cvdd")))
    assert named.files == given.files
    assert estimate_labels(made, committee, "cvdd", device="cpu").epochs == 300
