"""Verbs on saved sets, and what a run says before it starts."""

import json

import pytest
import torch

from dsdistill import SyntheticDataset
from dsdistill.cli.main import main

SMALL = ["--method", "DM", "--method.ipc", "1", "--method.iterations", "3", "--method.real_batch", "4"]
NETWORK = ["--method.network.width", "8"]


@pytest.fixture
def saved(images, tmp_path):
    assert (
        run("synthesize", "--data", images, "--method", "RandomReal", "--method.ipc", 1, "--out", tmp_path / "set") == 0
    )
    return tmp_path / "set"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_verify_tells_damage_from_what_is_whole(saved, capsys):
    assert run("verify", saved) == 0
    assert "DAMAGED" not in capsys.readouterr().out
    assert run("verify", saved, "--json") == 0
    assert all(entry["whole"] for entry in json.loads(capsys.readouterr().out))
    (saved / "grid.png").write_bytes(b"x")
    assert run("verify", saved) == 6
    said = capsys.readouterr()
    assert next(line for line in said.out.splitlines() if line.startswith("DAMAGED")).endswith("grid.png")
    assert "1 of 6 parts are damaged" in said.err


@pytest.mark.parametrize("format", ["pt", "parquet", "npz", "folder"])
def test_every_format_is_exported_beside_the_set(format, saved, capsys):
    if format == "parquet":
        pytest.importorskip("datasets", reason="the extra hub is not installed")
    assert run("export", saved, "--format", format, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 2
    name = {"pt": "set-pt", "folder": "set-images"}.get(format, f"set.{format}")
    assert report["path"].endswith(name)


def test_an_exported_set_comes_back(saved, images, tmp_path):
    original = SyntheticDataset.load(saved)
    assert run("export", saved, "--format", "pt", "--out", tmp_path / "pt") == 0
    mean, std = ([*values] for values in (original.normalization.mean, original.normalization.std))
    by_hand = ["--mean", mean, "--std", std, "--classes", "[cats, dögs 🐕]"]
    for name, stated in (("hand", by_hand), ("data", ["--data", images])):
        assert run("import", tmp_path / "pt", *stated, "--out", tmp_path / name) == 0
        back = SyntheticDataset.load(tmp_path / name)
        assert torch.equal(back.tensors()[0], original.tensors()[0])
        assert (back.classes, back.normalization) == (original.classes, original.normalization)
    assert back.recipe.source["name"] == "data"


def test_an_import_must_say_how_pixels_were_standardised(saved, images, tmp_path, capsys):
    run("export", saved, "--format", "pt", "--out", tmp_path / "pt")
    names = ["--classes", "[cats, dögs 🐕]", "--out", tmp_path / "back"]
    twice = ["--normalization", "cifar10", "--mean", "[0,0,0]", "--std", "[1,1,1]"]
    for stated in ([], twice, ["--data", images, "--normalization", "cifar10"]):
        assert run("import", tmp_path / "pt", *names, *stated) == 2
        assert "state it once" in capsys.readouterr().err
    assert run("import", tmp_path / "pt", *names, "--normalization", "cifar") == 2
    assert "did you mean 'cifar10'" in capsys.readouterr().err
    assert run("import", tmp_path / "pt", "--normalization", "cifar10", "--out", tmp_path / "back") == 2
    assert "label order" in capsys.readouterr().err
    images_file = tmp_path / "pt" / "images.pt"
    torch.save(torch.load(images_file, weights_only=True).sigmoid(), images_file)
    options = ["--normalization", "cifar10", "--pixels", "unit", "--factor", 2]
    assert run("import", tmp_path / "pt", *names, *options) == 0
    made = SyntheticDataset.load(tmp_path / "back")
    assert (made.normalization.std, len(made)) == ((0.2023, 0.1994, 0.2010), 8)


def test_whitened_sets_come_in_with_the_data_they_were_made_of(saved, images, tmp_path):
    run("export", saved, "--format", "pt", "--out", tmp_path / "pt")
    options = ["--data", images, "--load.zca", "unit", "--out", tmp_path / "back"]
    assert run("import", tmp_path / "pt", *options) == 0
    assert SyntheticDataset.load(tmp_path / "back").normalization.zca is not None


def test_a_pickle_is_refused(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    options = ["--normalization", "mnist", "--classes", "[a]", "--out", tmp_path / "out"]
    assert run("import", tmp_path / "x.pt", *options) == 6
    assert not (tmp_path / "out").exists()


def test_a_dry_run_estimates_and_writes_nothing(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("synthesize", "--data", images, *SMALL, *NETWORK, "--out", out, "--dry-run") == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["DM", "time", "memory", "disk", "chunk"]
    assert not out.exists()
    assert run("synthesize", "--data", images, *SMALL, *NETWORK, "--out", out, "--dry-run", "--json") == 0
    cost = json.loads(capsys.readouterr().out)
    assert (cost["steps"], cost["method"]) == (3, "DM")


def test_a_table_across_networks_and_classes(images, saved, tmp_path, capsys):
    options = ["--epochs", 2, "--repeats", 2, "--networks", "mlp", "convnet", "--together", 2, "--per_class"]
    assert run("evaluate", saved, "--data", images, *options, "--out", tmp_path / "across.json") == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("mlp", "convnet"))] == ["mlp", "convnet"]
    assert said.count("accuracy of each class") == 2
    assert len(json.loads((tmp_path / "across.json").read_text())["results"]) == 2
    assert run("evaluate", saved, "--data", images, "--networks", "mlp", "--network.name", "mlp") == 2
    assert run("evaluate", saved, "--data", images, "--networks", "mlpp") == 2
    assert "did you mean 'mlp'" in capsys.readouterr().err


@pytest.mark.parametrize("form", [["Tiled"], ["Tiled", "--method.form.factor", "4"], ["Plain"]])
def test_the_form_of_a_set_is_a_setting(form, images, tmp_path, capsys):
    options = [*SMALL, *NETWORK, "--method.on_small_class", "duplicate", "--method.form", *form]
    assert run("synthesize", "--data", images, *options, "--out", tmp_path / "out") == 0
    made = SyntheticDataset.load(tmp_path / "out")
    assert len(made) == 2 * {"Plain": 1, "Tiled": 4, "4": 16}[form[-1]]
    assert made.nbytes.images >= 2 * 3 * 8 * 8 * 4


def test_only_formats_that_round_tell_of_rounding(saved, capsys):
    for format, told in (("npz", False), ("pt", False), ("folder", True)):
        assert run("export", saved, "--format", format) == 0
        assert ("rounding" in capsys.readouterr().out) is told


def test_a_rehearsal_does_not_log_each_of_its_beginnings(images, tmp_path, caplog):
    options = ["--data", images, *SMALL, *NETWORK, "--out", tmp_path / "out"]
    assert run("synthesize", *options, "--dry-run") == 0
    assert "steps on" not in caplog.text
    assert run("synthesize", *options) == 0
    assert caplog.text.count("steps on") == 1


def test_the_network_to_be_tested_may_be_selected(images, saved, capsys):
    options = ["--data", images, "--epochs", 1, "--repeats", 1, "--baselines", "none"]
    assert run("evaluate", saved, *options, "--network", "mlp", "--selection", "validation", "--json") == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert (protocol["selection"], protocol["network"]["name"]) == ("validation", "mlp")


FOLLOWED = ["--method.iterations", 1, "--method.student_steps", 1, "--method.max_start_epoch", 1, "--device", "cpu"]
EXPERTS = ["--method.expert_epochs", 1, "--method.experts.count", 1, "--method.experts.training.batch_size", 4]


@pytest.mark.parametrize(("method", "protocol"), [("MTT", "mtt"), ("DATM", "datm"), ("RandomReal", None)])
def test_a_learned_step_size_is_shown_and_asks_for_its_protocol(method, protocol, images, tmp_path, capsys):
    options = [] if protocol is None else [*NETWORK, *FOLLOWED, *EXPERTS]
    command = ["synthesize", "--data", images, "--method", method, "--method.ipc", 1, *options]
    assert run(*command, "--out", tmp_path / "out", "--store", tmp_path / "store") == 0
    hint = capsys.readouterr().out.partition("score it with: ")[2].split()
    assert hint[hint.index("--protocol") + 1] == protocol if protocol else "--protocol" not in hint
    learned = {name: tensor.item() for name, tensor in SyntheticDataset.load(tmp_path / "out").learned.items()}
    assert run("inspect", tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("learned")]
    assert lines == [f"learned        lr = {value:.4g}" for value in learned.values()]
    assert run("inspect", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["learned"] == learned
    assert set(learned) == ({"lr"} if protocol else set())
