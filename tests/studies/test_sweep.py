"""``dsdistill sweep`` as a user meets it."""

import json
from dataclasses import replace

import pytest
from studies.actors import Fragile

from dsdistill import methods
from dsdistill.cli import sweep
from dsdistill.cli.main import main
from dsdistill.cli.verbs import VERBS
from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.experts import Teachers
from dsdistill.generative import Fusion, Models, Redraw, Weights
from dsdistill.methods import D4M, DM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Tiled

SMALL = ["--epochs", "2", "--repeats", "2", "--network.width", "8", "--network.depth", "1", "--workers", "1"]
QUICK = ["--set", "iterations=2", "--set", "DM.real_batch=4", "--set", "network.width=8", "--set", "network.depth=1"]


@pytest.fixture(autouse=True)
def verb(monkeypatch):
    monkeypatch.setitem(VERBS, "sweep", sweep.VERBS["sweep"])


def run(*arguments):
    try:
        return main(["sweep", "--data", "digits", "--devices", "cpu", *map(str, arguments)])
    except SystemExit as exit:
        return exit.code


def test_a_sweep_ends_with_a_table_a_plot_and_lines(tmp_path, capsys):
    command = ["--methods", "DM,randomreal", "--ipc", "1,2", "--seeds", "2", *SMALL, *QUICK, "--out", tmp_path]
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert "DM            2" in said
    assert "2 x 2" in said
    assert f"plot: {tmp_path / 'budget.png'}" in said
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert (rows[0]["settings"]["iterations"], rows[0]["settings"]["network"]["width"]) == (2, 8)
    assert rows[0]["evaluation"]["protocol"]["epochs"] == 2
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(*command, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 4
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_printed_config_is_the_sweep(tmp_path, capsys):
    command = ["--methods", "RandomReal", "--ipc", "1,2", "--seeds", "1", *SMALL, "--set", "on_small_class=cap"]
    assert run(*command, "--out", tmp_path / "a", "--print_config") == 0
    config = tmp_path / "sweep.yaml"
    config.write_text(capsys.readouterr().out)
    assert main(["sweep", "--config", str(config), "--set", "on_small_class=duplicate", "--ipc", "1"]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    assert (row["settings"]["on_small_class"], row["ipc"]) == ("duplicate", 1)
    capsys.readouterr()
    assert run(*command[:-2], "--out", tmp_path / "b", "--print_config") == 0
    config.write_text(capsys.readouterr().out)
    assert main(["sweep", "--config", str(config)]) == 0


def test_failed_cells_make_exit_code_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(methods._registry._added, "Fragile", Fragile)
    cure = tmp_path / "cure"
    command = ["--methods", "Fragile,RandomReal", "--set", f"cure={cure}", "--ipc", 1, "--seeds", "3,", *SMALL]
    assert run(*command, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "RandomReal    1" in said.out
    assert "1 of 2 cells failed:\n  Fragile ipc 1 seed 3: ValueError: no cure" in said.err
    assert "error.txt" in said.err
    assert run(*command, "--out", tmp_path / "out", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"] == "StudyIncomplete"
    cure.touch()
    assert run(*command, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--methods", "DMM"], 2, "did you mean 'DM'"),
        (["--methods", ","], 2, "at least one method"),
        (["--methods", "DM", "--set", "iteration=3"], 2, "did you mean 'iterations'"),
        (["--methods", "RandomReal", "--set", "iterations=3"], 2, "unknown setting of RandomReal 'iterations'"),
        (["--methods", "DM", "--set", "DMM.iterations=3"], 2, "did you mean 'DM'"),
        (["--methods", "DM", "--set", "DM.lr_image=3"], 2, "did you mean 'lr_images'"),
        (["--methods", "DM", "--set", "network.widht=3"], 2, "did you mean 'width'"),
        (["--methods", "DM", "--set", "iterations"], 2, "SETTING=VALUE"),
        (["--methods", "DM", "--set", "iterations=abc"], 2, "DM.iterations = 'abc'"),
        (["--methods", "DM", "--set", "lr_images.x=3"], 2, "has no settings of its own"),
        (["--methods", "DM", "--set", "DM.ipc=3"], 2, "given with --ipc"),
        (["--methods", "DM", "--ipc", "1,x"], 2, "integers with commas"),
        (["--methods", "DM", "--ipc", "500"], 3, "fewer than ipc=500"),
        (["--methods", "DM", "--seeds", "0"], 2, "seeds = 0"),
        (["--methods", "DM", "--seeds", "a"], 2, "integers with commas"),
        (["--methods", "DM", "--protocol", "dsaa"], 2, "did you mean 'dsa'"),
        (["--methods", "DM", "--devices", "cuda:77"], 2, "cuda:77"),
        (["--methods", "DM", "--method.ipc", "1"], 2, "did you mean '--methods'"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_file_is_made(arguments, code, message, tmp_path, capsys):
    assert run(*arguments, "--out", tmp_path / "out") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_methods_that_have_them():
    made = sweep.methods(
        "DM, RandomReal", ["iterations=7", "on_small_class=cap", "dm.lr_images=0.5", "network.norm=batch"]
    )
    assert made == [
        DM(iterations=7, on_small_class="cap", lr_images=0.5, network=NetworkSpec(norm="batch")),
        RandomReal(on_small_class="cap"),
    ]
    assert sweep.methods("DM", ["augmentation=null"]) == [DM(augmentation=None)]


def test_settings_reach_settings_that_are_null():
    weights = Weights(path="/sd", class_ids=(4, 2), download=True)
    set_here = ["models.weights.path=/sd", "models.weights.class_ids=[4,2]", "models.weights.download=true"]
    assert sweep.methods("D4M", [*set_here, "fusion.steps=3", "redraw.confidence=0.9"]) == [
        D4M(models=Models(weights=weights), fusion=Fusion(steps=3), redraw=Redraw(confidence=0.9))
    ]
    whole = ['models={"weights": {"path": "/sd", "class_ids": [4, 2], "download": true}}', 'fusion={"steps": 3}']
    assert sweep.methods("D4M", whole) == [D4M(models=Models(weights=weights), fusion=Fusion(steps=3))]
    (made,) = sweep.methods("D4M", ["redraw.teachers.training.epochs=5"])  # all else as a redraw has it
    assert made.redraw == replace(
        Redraw(), teachers=replace(Teachers(), training=replace(Teachers().training, epochs=5))
    )
    (made,) = sweep.methods("D4M", ['redraw={"confidence": 0.7}', "redraw.tries=3"])
    assert made.redraw == Redraw(confidence=0.7, tries=3)
    assert sweep.methods("DM", ['form={"type": "Tiled", "factor": 3}']) == [DM(form=Tiled(factor=3))]
    with pytest.raises(InvalidSetting, match=r"Weights\.path"):
        sweep.methods("D4M", ["models.weights.download=true"])
    with pytest.raises(UnknownName, match="did you mean 'path'"):
        sweep.methods("D4M", ["models.weights.pth=/sd"])
    with pytest.raises(InvalidSetting, match=r"models\.size has no settings"):
        sweep.methods("D4M", ["models.size.x=3"])


def test_settings_that_are_none_are_refused():
    with pytest.raises(InvalidSetting):
        sweep.methods("DM", ["=3"])
    with pytest.raises(UnknownName):
        sweep.methods("DM", ["nothing=1"])
