"""The commands that follow a synthesis are those of its method, and can be pasted."""

import shlex

import pytest

from dsdistill.cli.main import main

TRAINED = ["--method.teachers.networks", '[{"name": "convnet", "norm": "batch", "width": 4, "depth": 1}]']
QUICK = ["--method.teachers.training.epochs", "1", "--method.ipc", "1", "--device", "cpu"]
FEW = ["--epochs", "1", "--device", "cpu"]
SMALL = ["--network", "convnet", "--network.norm", "batch", "--network.width", "4", "--network.depth", "1"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "protocol", "kind"),
    [
        (["SRe2L", "--method.iterations", 1], "cvdd", None),
        (["NRRDD", "--method.iterations", 1, "--method.pool", 4], "rethinking_soft", "distances"),
        (["RDED", "--method.pool", 4], "rded_small", None),
    ],
)
def test_sets_of_teachers_are_labelled_and_scored_by_them(options, protocol, kind, images, tmp_path, capsys):
    out = tmp_path / "my set"
    start = ["synthesize", "--data", images, "--load.mirror_safe", "false", "--method", *options, *TRAINED, *QUICK]
    assert run(*start, "--store", tmp_path / "store", "--out", out) == 0
    said = capsys.readouterr().out.partition("score it on what they say:\n")[2]
    relabel, evaluate = map(shlex.split, said.splitlines()[:2])
    assert relabel[:3] == ["dsdistill", "relabel", str(out)]
    assert evaluate[evaluate.index("--protocol") + 1] == protocol
    assert (kind is None) == ("--kind" not in relabel)
    assert run(*relabel[1:], *FEW) == 0
    assert run(*evaluate[1:], *FEW, *SMALL, "--repeats", 1) == 0
    assert f"protocol {protocol}" in capsys.readouterr().out


def test_static_labels_and_an_equal_vote_where_priors_are_unknown(images, tmp_path, capsys):
    networks = '[{"name": "convnet", "norm": "batch", "width": 4}, {"name": "convnet", "norm": "batch", "width": 5}]'
    start = ["synthesize", "--data", images, "--method", "INFER", "--method.iterations", 1]
    start += ["--method.teachers.networks", networks, *QUICK, "--method.ipc", 4, "--store", tmp_path / "store"]
    assert run(*start, "--out", tmp_path / "set") == 0
    said = capsys.readouterr().out.partition("score it on what they say:\n")[2]
    relabel, evaluate = map(shlex.split, said.splitlines()[:2])
    assert relabel[relabel.index("--kind") + 1] == "static"
    assert relabel[relabel.index("--temperature") + 1] == "equal"
    assert len([word for word in evaluate if word.startswith(str(tmp_path / "store"))]) == 2
    assert run(*relabel[1:], "--device", "cpu") == 0
    assert run(*evaluate[1:], *FEW, *SMALL, "--repeats", 1) == 0


def test_views_that_cannot_be_kept_are_asked_about_as_they_come(images, tmp_path, capsys):
    start = ["synthesize", "--data", images, "--load.image_size", 72, "--method", "RDED", "--method.pool", 4]
    assert run(*start, *TRAINED, *QUICK, "--store", tmp_path / "store", "--out", tmp_path / "set") == 0
    command = shlex.split(capsys.readouterr().out.partition("score it with: ")[2])
    assert command[command.index("--protocol") + 1] == "rded"
    assert "--labels" not in command
    assert run(*command[1:], *FEW, *SMALL, "--repeats", 1) == 0


def test_teachers_of_ones_own_code_are_named_and_not_loaded(images, tmp_path, capsys, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from dsdistill.networks import NetworkSpec\n"
        "def make(shape, num_classes):\n"
        "    import torch\n"
        "    spec = NetworkSpec('convnet', norm='batch', width=4, depth=1)\n"
        "    return spec.build(shape, num_classes, generator=torch.Generator().manual_seed(0), device='cpu')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--method.teachers.networks", '[{"name": "own_nets:make"}]']
    start = ["synthesize", "--data", images, "--method", "SRe2L", "--method.iterations", 1, *own, *QUICK]
    assert run(*start, "--store", tmp_path / "store", "--out", tmp_path / "set") == 0
    assert "dsdistill relabel" in capsys.readouterr().out
