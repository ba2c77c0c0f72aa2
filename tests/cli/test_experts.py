"""``dsdistill experts``, and the store of ``synthesize``."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import dsdistill as dd
from dsdistill.cli.main import main
from dsdistill.engine import Run
from dsdistill.experts import Experts, FlatTraining, PlainTraining, Trajectories
from dsdistill.experts.trainer import Trainer
from dsdistill.methods import RandomReal
from dsdistill.networks import NetworkSpec

FEW = ["--count", "2", "--epochs", "2", "--training.batch_size", "4", "--network.width", "4", "--device", "cpu"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def begun(monkeypatch):
    """Experts of which an epoch was begun."""
    made, epoch = [], Trainer.epoch

    def watched(self, experts, pace, **more):
        made.append(experts[0].index)
        epoch(self, experts, pace, **more)

    monkeypatch.setattr(Trainer, "epoch", watched)
    return made


def test_experts_are_trained_and_found(images, tmp_path, capsys, caplog, begun):
    caplog.set_level("INFO")
    command = ["experts", "--data", images, *FEW, "--store", tmp_path / "store"]
    assert run(*command) == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "store" / "experts").iterdir()
    assert f"2 experts of 2 epochs in {folder} (" in said
    assert "test accuracy of 2 of them after the last epoch: " in said
    assert " ± " in said
    logged = [record.message for record in caplog.records]
    assert any(
        line.startswith("2 experts are to be trained on the real images up to epoch 2 (PlainTraining): ")
        for line in logged
    )
    assert any(line.startswith("experts take about") for line in logged)
    begun.clear()
    told = answer(capsys, *command)
    assert begun == []
    assert told["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (told["folder"], told["count"], told["epochs"]) == (str(folder), 2, 2)
    assert len(told["accuracies"]) == 2


def test_what_is_asked_for_is_what_the_library_makes(images, tmp_path, capsys):
    flat = ["--training", "FlatTraining", "--training.rho", "0.1", "--precision", "float16", "--seed", "3"]
    told = answer(capsys, "experts", "--data", images, *flat, *FEW, "--store", tmp_path)
    training = FlatTraining(rho=0.1, batch_size=4)
    experts = Experts(count=2, training=training, precision="float16", seed=3)
    made = dd.train_experts(
        dd.data.load(images), experts, NetworkSpec(width=4), epochs=2, store=tmp_path / "other", device="cpu"
    )
    assert Path(told["folder"]).name == made.folder.name


def test_a_dry_run_writes_nothing(images, tmp_path, capsys):
    command = ["experts", "--data", images, *FEW, "--store", tmp_path / "store", "--dry-run"]
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert "2 experts of 2 epochs on cpu" in said
    assert "  time    " in said
    assert "  disk    " in said
    assert answer(capsys, *command)["disk"] > 0
    assert not (tmp_path / "store").exists()


def test_a_stopped_command_continues(images, tmp_path, capsys, begun, monkeypatch):
    epoch = Trainer.epoch

    def signalled(self, experts, pace, **more):
        epoch(self, experts, pace, **more)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "epoch", signalled)
    command = ["experts", "--data", images, *FEW, "--store", tmp_path]
    assert run(*command) == 143
    (folder,) = (tmp_path / "experts").iterdir()
    said = capsys.readouterr().err
    assert f"after 3 epochs of experts, kept in {folder}. Run the same command again to continue" in said
    assert answer(capsys, *command)["epochs"] == 2
    assert begun == [0, 0, 1, 1]


def test_more_epochs_than_the_training_has(images, tmp_path, capsys):
    command = ["experts", "--data", images, *FEW, "--training.epochs", "1", "--store", tmp_path]
    assert run(*command) == 2
    assert "at most 1, the epochs of PlainTraining: raise those" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Follows(RandomReal):
    """Asks for experts, and leaves it at that."""

    paper: ClassVar[str] = "none"

    def prepare(self, run: Run) -> None:
        training = PlainTraining(epochs=1, batch_size=4)
        Trajectories.of(run, Experts(count=1, training=training), NetworkSpec(width=4), 1)


def test_a_method_finds_its_experts_in_the_store(images, tmp_path, capsys):
    method = ["synthesize", "--data", images, "--method", f"{__name__}.Follows", "--method.ipc", "1", "--device", "cpu"]
    cost = answer(capsys, *method, "--out", tmp_path / "out", "--store", tmp_path / "store", "--dry-run")
    assert cost["store"] > 0
    assert not (tmp_path / "store").exists()
    assert run(*method, "--out", tmp_path / "out", "--store", tmp_path / "store") == 0
    assert len(list((tmp_path / "store").rglob("expert-*"))) == 1
    cost = answer(capsys, *method, "--out", tmp_path / "next", "--store", tmp_path / "store", "--dry-run")
    assert cost["store"] == 0
    assert run(*method, "--out", tmp_path / "next", "--dry-run") == 0
    assert (
        "  store   0.0 MiB of trained networks, kept for other runs" in capsys.readouterr().out
    )  # not in the cache folder


def test_stopped_while_experts_are_trained_it_says_what_is_kept_and_where(images, tmp_path, capsys, monkeypatch):
    epoch = Trainer.epoch

    def signalled(self, experts, pace, **more):
        epoch(self, experts, pace, **more)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "epoch", signalled)
    method = ["synthesize", "--data", images, "--method", f"{__name__}.Follows", "--method.ipc", "1", "--device", "cpu"]
    assert run(*method, "--out", tmp_path / "out", "--store", tmp_path / "store") == 130
    (folder,) = (tmp_path / "store" / "experts").iterdir()
    said = capsys.readouterr().err
    assert f"stopped by SIGINT after 1 epochs of experts, kept in {folder}. Run the same command again" in said


@pytest.mark.parametrize("below", [".", "below/it"])
@pytest.mark.parametrize("verb", ["synthesize", "experts"])
def test_a_store_that_is_a_file_is_refused_before_anything_is_made(verb, below, images, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    options = ["--data", images, "--store", tmp_path / "file" / below]
    if verb == "synthesize":
        options += ["--method", f"{__name__}.Follows", "--method.ipc", "1", "--out", tmp_path / "out"]
    before = sorted(tmp_path.iterdir())
    for dry_run in ([], ["--dry-run"]):
        assert run(verb, *options, *dry_run) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'file'}: is a file, a folder of what runs share (--store) is needed" in said
    assert sorted(tmp_path.iterdir()) == before
