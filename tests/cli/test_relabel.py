"""``dsdistill relabel``, and ``evaluate`` with labels and teachers."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from relabelling.makers import make_teacher

import dsdistill as dd
from dsdistill.cli.main import main
from dsdistill.evaluation import get_protocol
from dsdistill.experts import Committee
from dsdistill.relabelling import Float, LabelSet, TopK, relabel
from dsdistill.relabelling.labeller import Labeller

SMALL = ["--network", "convnet", "--network.norm", "batch", "--network.width", "4", "--network.depth", "1"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folders(images, tmp_path):
    """The folders of a set and of its two teachers."""
    source = dd.data.load(images)
    dd.synthesize(dd.methods.RandomReal(ipc=2), source, out=tmp_path / "set", device="cpu")
    for seed in range(2):
        make_teacher(source, f"teacher{seed}", seed).save(tmp_path / "teachers" / f"teacher{seed}")
    return tmp_path / "set", tmp_path / "teachers"


def command(folders, *more):
    return ["relabel", folders[0], "--teachers", folders[1], "--epochs", 3, "--device", "cpu", *more]


def test_labels_are_what_the_library_makes(folders, tmp_path, capsys):
    assert run(*command(folders, "--temperature", 10, "--seed", 4, "--out", tmp_path / "labels")) == 0
    said = capsys.readouterr().out
    assert "replayed labels of 4 images, 3 times, on cpu:\n  time    " in said
    assert "times the bytes of the images; saved in " in said
    synthetic, committee = dd.SyntheticDataset.load(folders[0]), Committee.load(folders[1])
    options = {"epochs": 3, "temperature": 10.0, "seed": 4, "device": "cpu"}
    made, read = relabel(synthetic, committee, get_protocol("cvdd"), **options), LabelSet.load(tmp_path / "labels")
    assert read.files == made.files
    assert (read.heading.teacher_mode, read.batch_size, read.heading.codec) == ("batch", 16, Float(16))
    told = answer(capsys, *command(folders, "--temperature", 10, "--seed", 4, "--out", tmp_path / "labels"))
    assert told["bytes"] == made.nbytes


def test_the_vote_is_the_protocols_or_equal(folders, tmp_path, capsys):
    told = answer(capsys, *command(folders, "--out", tmp_path / "labels"))
    assert told["weights"] == Committee.load(folders[1]).weights(10.0).tolist()
    told = answer(capsys, *command(folders, "--temperature", "equal", "--out", tmp_path / "equal"))
    assert told["weights"] == [0.5, 0.5]
    one = Committee.load(folders[1])[1]
    replace(one, performance=None).save(folders[1] / "teacher1")
    assert run(*command(folders, "--out", tmp_path / "none")) == 2
    said = capsys.readouterr().err
    assert "dsdistill prior" in said
    assert "--temperature equal" in said
    assert run(*command(folders, "--temperature", "equal", "--out", tmp_path / "none")) == 0


def test_the_commands_of_the_page_of_nrrdd_run(folders, images, tmp_path):
    page = (Path(dd.__file__).parents[1] / "docs" / "methods" / "nrrdd.md").read_text(encoding="utf-8")
    taken = [line.split("--protocol ")[1].split()[0] for line in page.splitlines() if "--protocol " in line]
    assert len(taken) == 2
    assert len(set(taken)) == 1
    labels, given = tmp_path / "labels", ["--teachers", folders[1], "--protocol", taken[0], "--device", "cpu"]
    assert run("relabel", folders[0], *given, "--epochs", 1, "--kind", "distances", "--out", labels) == 0
    few = ["--epochs", 1, "--repeats", 1, *SMALL]
    assert run("evaluate", folders[0], "--data", images, "--labels", labels, *given, *few) == 0


def test_a_dry_run_tells_bytes_and_time_and_writes_nothing(folders, tmp_path, capsys):
    cost = answer(capsys, *command(folders, "--out", tmp_path / "labels", "--dry-run"))
    assert not (tmp_path / "labels").exists()
    assert run(*command(folders, "--out", tmp_path / "labels")) == 0
    assert cost["disk"] == LabelSet.load(tmp_path / "labels").nbytes
    assert cost["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "codec", "kind"),
    [
        (["--codec", "topk", "--top", 2, "--rest", "renorm"], TopK(k=2, rest="renorm"), "replayed"),
        (["--kind", "distances", "--codec", "float32"], Float(32), "distances"),
        (["--protocol", "sre2l_tiny", "--calibration.low", "0.1"], Float(16), "replayed"),
    ],
)
def test_kinds_and_codecs_are_chosen(options, codec, kind, folders, tmp_path):
    assert run(*command(folders, *options, "--out", tmp_path / "labels")) == 0
    labels = LabelSet.load(tmp_path / "labels")
    assert (labels.heading.codec, labels.kind) == (codec, kind)
    assert (labels.heading.calibration is not None) == ("--calibration.low" in options)
    labels.verify()


def test_static_labels_have_no_epochs(folders, tmp_path, capsys):
    start = ["relabel", folders[0], "--teachers", folders[1], "--kind", "static", "--device", "cpu"]
    assert run(*start, "--out", tmp_path / "labels") == 0
    assert LabelSet.load(tmp_path / "labels").epochs is None
    capsys.readouterr()
    assert run(*start, "--epochs", 3, "--out", tmp_path / "others") == 2
    assert "static labels are made once" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["rethinking_hard", "dsa"])
def test_labels_that_no_network_would_learn_are_refused(protocol, folders, tmp_path, capsys):
    assert run(*command(folders, "--protocol", protocol, "--out", tmp_path / "labels")) == 2
    assert "learn classes alone" in capsys.readouterr().err
    assert not (tmp_path / "labels").exists()


def test_options_that_say_nothing_are_refused(folders, tmp_path, capsys):
    assert run(*command(folders, "--top", 5, "--out", tmp_path / "labels")) == 2
    assert "topk, if --top or --rest are given" in capsys.readouterr().err
    assert run(*command(folders, "--protocol", "rded", "--out", tmp_path / "labels")) == 2
    assert "labels are kept for ResizedCrop and PadCrop" in capsys.readouterr().err
    assert run("relabel", folders[0], "--teachers", tmp_path, "--out", tmp_path / "labels") == 6
    assert "holds no teacher" in capsys.readouterr().err


def test_a_stopped_command_continues(folders, tmp_path, capsys, monkeypatch):
    epoch, begun = Labeller.made, []

    def signalled(self, number):
        begun.append(number)
        if begun == [0, 1]:
            os.kill(os.getpid(), signal.SIGINT)
        return epoch(self, number)

    monkeypatch.setattr(Labeller, "made", signalled)
    assert run(*command(folders, "--out", tmp_path / "labels")) == 130
    assert "Run the same command again to continue" in capsys.readouterr().err
    assert run(*command(folders, "--out", tmp_path / "labels")) == 0
    assert begun == [0, 1, 2]


def test_a_set_is_scored_on_its_labels(images, folders, tmp_path, capsys):
    assert run(*command(folders, "--out", tmp_path / "labels")) == 0
    start = ["evaluate", folders[0], "--data", images, "--protocol", "cvdd", "--epochs", 2, "--repeats", 1, *SMALL]
    taught = ["--labels", tmp_path / "labels", "--teachers", folders[1], "--device", "cpu"]
    assert run(*start, *taught) == 0
    said = capsys.readouterr().out
    assert "random real images, hard labels" in said
    assert "replayed labels by teacher0 (0.0 %), teacher1 (0.0 %)" in said
    told = answer(capsys, *start, *taught[:2], "--baselines", "none", "--device", "cpu")
    assert list(told["scores"]) == ["synthetic", "synthetic, hard"]
    assert run(*start, "--device", "cpu") == 2
    assert "protocol cvdd learns from teachers" in capsys.readouterr().err
    assert run(*start, "--batch_size", 8, *taught) == 2
    assert "batch_size = 8 is not valid: 16, as in the training" in capsys.readouterr().err
