"""``dsdistill teachers`` and ``dsdistill prior``: what they train, what they only tell, and what they refuse."""

import dataclasses
import json

import pytest
import torch

import dsdistill as dd
from dsdistill.cli.main import main
from dsdistill.experts import Committee, estimate_teachers, import_teacher, train_teachers

SMALL = ["--networks", "convnet", "--width", "4", "--epochs", "1", "--batch_size", "8", "--device", "cpu"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_committee_is_trained_found_and_priced(images, tmp_path, capsys):
    start = ["teachers", "--data", images, "--out", tmp_path / "teachers", *SMALL]
    cost = answer(capsys, *start, "--dry-run")
    assert not (tmp_path / "teachers").exists()
    assert cost["names"] == ["convnet-width4"]
    assert cost["disk"] > 0
    made = answer(capsys, *start)
    assert [one["name"] for one in made["teachers"]] == ["convnet-width4"]
    assert answer(capsys, *start) == made
    found = answer(capsys, *start, "--dry-run")
    assert (found["seconds"], found["disk"]) == (0, 0)


def test_a_prior_is_priced_and_measured(images, tmp_path, capsys):
    assert run("teachers", "--data", images, "--out", tmp_path, *SMALL) == 0
    few = ["--ipc", 1, "--iterations", 1, "--epochs", 1, "--network", "convnet", "--network.width", 4, "--network.norm"]
    start = ["prior", tmp_path, "--data", images, *few, "batch", "--device", "cpu"]
    assert answer(capsys, *start, "--dry-run")["teachers"] == ["convnet-width4"]
    assert Committee.load(tmp_path)[0].performance is None
    found = answer(capsys, *start)
    assert found == {"convnet-width4": Committee.load(tmp_path)[0].performance}
    assert answer(capsys, *start, "--dry-run") == {"teachers": [], "device": "cpu", "seconds": 0.0}
    assert run("prior", tmp_path, "--data", "cifar10", "--published") == 2
    assert "networks of the published committee" in capsys.readouterr().err
    assert run("prior", tmp_path, "--data", "cifar10", "--published", "--dry-run", "--ipc", 3) == 2
    assert "without --ipc, --dry_run: nothing is measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 3], "without --epochs"),
        (["--recipe", "cvdd_cifar", "--lr", 0.1], "without --recipe, --lr"),
        (["--dry-run"], "without --dry-run"),
    ],
)
def test_training_says_nothing_beside_weights(options, message, images, tmp_path, capsys):
    start = ["teachers", "--data", images, "--networks", "convnet", "--out", tmp_path, "--weights", "x.safetensors"]
    assert run(*start, *options) == 2
    assert message in capsys.readouterr().err


def test_weights_do_not_replace_a_teacher_that_is_there(images, tmp_path):
    out = tmp_path / "teachers"
    assert run("teachers", "--data", images, "--out", out, *SMALL) == 0
    one = dataclasses.replace(Committee.load(out)[0], performance=40.0)
    one.save(out / one.name)
    assert dd.experts.keep_teacher(dataclasses.replace(one, performance=None), out).performance == 40.0
    blank = one.spec.build(one.shape, 2, generator=torch.Generator(), device="cpu")
    with pytest.raises(dd.errors.OutputConflict, match="holds another teacher of that name"):
        dd.experts.keep_teacher(dataclasses.replace(one, network=blank), out)
    dd.experts.keep_teacher(one, tmp_path / "new")
    assert Committee.load(tmp_path / "new")[0].digest == one.digest


def test_networks_may_be_named_in_the_library_too(source, tmp_path):
    made = train_teachers(source, ["resnet18"], tmp_path, dd.experts.SQUEEZE.__class__(epochs=1), device="cpu")
    assert made[0].spec.norm == "batch"
    assert estimate_teachers(source, "resnet18", tmp_path / "new", "sre2l_tiny", device="cpu").names == ("resnet18",)
    assert not (tmp_path / "new").exists()
    weights = made[0].network.state_dict()
    with pytest.raises(dd.errors.BadData, match="where guessing gives"):
        import_teacher("resnet18", {name: 0 * tensor for name, tensor in weights.items()}, source, device="cpu")


def test_a_single_class_has_no_teacher(source, tmp_path):
    one = dd.data.ImageSource("one", ["a"], source.images[:5], source.targets[:5])
    with pytest.raises(dd.errors.BadData, match="'one' has one class"):
        train_teachers(one, ["resnet18"], tmp_path / "out", device="cpu")
    with pytest.raises(dd.errors.BadData, match="'one' has one class"):
        import_teacher("resnet18", {}, one, device="cpu")
    assert not (tmp_path / "out").exists()


def test_teachers_of_whitened_images_come_with_a_warning(images, tmp_path, caplog):
    assert run("teachers", "--data", images, "--load.zca", "true", "--out", tmp_path, *SMALL) == 0
    assert "methods that recover images from teachers will refuse these" in caplog.text
