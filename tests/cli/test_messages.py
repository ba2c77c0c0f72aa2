"""What the command line says of mistakes in its arguments and files of settings."""

import re
from pathlib import Path

import pytest

from dsdistill.cli import options
from dsdistill.cli.main import main
from dsdistill.data import load

MAKE = ["synthesize", "--data", "digits", "--out", "never"]


@pytest.fixture(autouse=True)
def nothing_is_opened_or_left(monkeypatch, tmp_path):
    def opened(*_, **__):
        raise AssertionError("images were opened before the mistake was found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsdistill.data.load", opened)


def refused(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "DM", "--method.form", "tiled"], "unknown form 'tiled'; did you mean 'Tiled'"),
        (["--method", "DM", "--method.augmentation", "siamese"], "unknown augmentation .*did you mean 'Siamese'"),
        (["--method", "DM", "--method.form", "Tiled", "--method.form.facto", "2"], "of Tiled 'facto'; .*'factor'"),
        (["--method", "DM", "--method.network", "lenett"], "unknown network 'lenett'; did you mean 'lenet'"),
        (["--method.ipc", "2", "--method", "DM"], "give --method NAME before its settings"),
        (["--method.ipc", "2"], r"in YAML: method: \{class_path: DM, init_args: \{ipc: 1\}\}"),
        (["--method", "DM", "--load.image_size", "large"], r"got 'large'; give .*'\[24,40\]' \(quoted"),
    ],
)
def test_mistakes_in_arguments(arguments, message, capsys):
    code, said = refused(capsys, *MAKE, *arguments)
    assert (code, re.search(message, said) is not None) == (2, True), said
    assert "abstract" not in said
    assert "unknown method" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\xff", "bad.yaml: no text in UTF-8"),
        (b"", "bad.yaml: holds no settings"),
        (b"seed", "bad.yaml: holds no settings"),
        (b"seed: [1", "bad.yaml: "),
        (b"method: {name: DM, ipc: 1}", "give --method NAME"),
        (b"method: DM\nmethod.ipc: 1", "give --method NAME"),
    ],
)
def test_mistakes_in_files_of_settings(content, message, capsys):
    Path("bad.yaml").write_bytes(content)
    code, said = refused(capsys, *MAKE, "--config", "bad.yaml")
    assert (code, message in said) == (2, True), said


def test_a_network_in_a_file_is_told_its_form(capsys):
    Path("run.yaml").write_text("network: lenet")
    code, said = refused(capsys, "evaluate", "set", "--data", "digits", "--config", "run.yaml")
    assert (code, "network: {name: NAME}" in said, "unknown" in said) == (2, True, False), said


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["evaluate", "--data", "digits"], "PATH"),
        (["evaluate"], "PATH, --data"),
        (["import", "x.pt"], "--out"),
    ],
)
def test_missing_arguments_are_named_as_they_are_given(arguments, names, capsys):
    code, said = refused(capsys, *arguments)
    assert code == 2
    assert said.splitlines() == [
        f"dsdistill {arguments[0]}: error: the following arguments are required: {names}",
        f"Help: dsdistill {arguments[0]} --help",
    ]


def test_names_may_have_commas_between():
    assert options.split(["a,b", "c", ""]) == options.split("a, b,c") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "convnet,lenett"], "did you mean 'lenet'"),
        (["--networks"], "name at least one network"),
        (["--baselines", "foo"], "unknown baseline 'foo'"),
        (["--together", "0"], "--together = 0"),
        (["--repeats", "0"], "--repeats = 0"),
        (["--protocol", "dss"], "did you mean 'dsa'"),
        (["--selection", "best"], "'last', 'validation'"),
        (["--out", "."], "is a folder; name a JSON file"),
        (["--out", "file/score.json"], "is a file, an output folder is needed"),
    ],
)
def test_evaluations_are_checked_before_images_are_opened(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("dsdistill.SyntheticDataset.load", lambda path: None)
    Path("file").touch()
    code, said = refused(capsys, "evaluate", "set", "--data", "digits", *arguments)
    assert (code, message in said) == (2, True), said


def test_an_unknown_normalization_is_named_first(capsys):
    code, said = refused(capsys, "import", "x.pt", "--data", "digits", "--normalization", "cifarten", "--out", "set")
    assert (code, "unknown normalization 'cifarten'" in said) == (2, True), said
    code, said = refused(capsys, "import", "x.pt", "--data", "digits", "--normalization", "cifar10", "--out", "set")
    assert (code, "state it once" in said) == (2, True), said


def test_a_path_that_is_not_there_is_not_verified(capsys):
    code, said = refused(capsys, "verify", "nope")
    assert (code, "nope: there is no such file or folder" in said) == (6, True), said


def test_a_sweep_names_its_own_mend_of_a_small_class(capsys, monkeypatch):
    monkeypatch.setattr("dsdistill.data.load", load)
    sweep = ["sweep", "--data", "digits", "--methods", "RandomReal", "--ipc", "1,1000", "--out", "study"]
    code, said = refused(capsys, *sweep)
    assert (code, "--set on_small_class=cap" in said) == (3, True), said
    assert not Path("study").exists()
