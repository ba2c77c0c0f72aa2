"""The command line as a user meets it: output, files and exit codes."""

import json
import re
import shlex
import subprocess
import sys

import pytest

import dsdistill as dd
from dsdistill.cli import verbs
from dsdistill.cli.main import main
from dsdistill.cli.verbs import VERBS

SMALL = ["--method", "DM", "--method.ipc", "1", "--method.iterations", "3", "--method.real_batch", "4"]
NETWORK = ["--method.network.name", "convnet", "--method.network.width", "8"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Exit code and what was said on standard error."""
    try:
        code = run(*arguments)
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


def test_from_an_image_folder_to_a_score_and_files(images, tmp_path, capsys):
    out = tmp_path / "set"
    assert run("synthesize", "--data", images, *SMALL, *NETWORK, "--out", out) == 0
    said = capsys.readouterr().out
    assert "2 classes, ipc=1" in said
    assert f"dsdistill evaluate {out} --data {images}" in said

    score = tmp_path / "score.json"
    options = ["--epochs", 4, "--repeats", 2, "--network.width", 8, "--baselines", "random", "whole", "--out", score]
    assert run("evaluate", out, "--data", images, *options) == 0
    said = capsys.readouterr().out
    for row in ("synthetic set", "random real images", "whole training set", "paired by seed"):
        assert row in said
    saved = json.loads(score.read_text())
    assert [saved["scores"][row]["n"] for row in ("synthetic", "random", "whole")] == [2, 2, 2]
    assert saved["images"] == {"synthetic": 2, "random": 2, "whole": 12}
    assert saved["protocol"]["epochs"] == 4

    assert run("inspect", out) == 0
    said = capsys.readouterr().out
    assert "cats, dögs 🐕" in said
    assert "all files match" in said

    assert run("export", out, "--format", "folder", "--out", tmp_path / "png") == 0
    assert len(list((tmp_path / "png").rglob("*.png"))) == 2
    assert run("export", out, "--format", "npz") == 0
    assert (tmp_path / "set.npz").exists()


def test_json_goes_alone_to_standard_output(images, tmp_path, capsys):
    out = tmp_path / "set"
    assert run("synthesize", "--data", images, *SMALL, *NETWORK, "--out", out, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["classes"] == ["cats", "dögs 🐕"]
    assert made["recipe"]["method"]["iterations"] == 3
    evaluate = ["--data", images, "--epochs", 1, "--repeats", 1, "--network.width", 8, "--json"]
    assert run("evaluate", out, *evaluate) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["synthetic"]["n"] == 1
    for command in (["inspect", out], ["methods"], ["show", "DM"], ["export", out, "--out", tmp_path / "png"]):
        assert run(*command, "--json") == 0
        assert json.loads(capsys.readouterr().out)
    assert run("show", "DMM", "--json") == 2
    failed = json.loads(capsys.readouterr().out)
    assert failed["error"] == "UnknownName"
    assert failed["exit_code"] == 2


def test_a_printed_config_is_the_run(images, tmp_path, capsys):
    command = ["--data", images, *SMALL, *NETWORK, "--out", tmp_path / "a", "--seed", 3]
    with pytest.raises(SystemExit) as exit:
        run("synthesize", *command, "--print_config")
    assert exit.value.code == 0
    config = tmp_path / "run.yaml"
    config.write_text(capsys.readouterr().out)
    assert run("synthesize", *command) == 0
    assert run("synthesize", "--config", config, "--out", tmp_path / "b") == 0
    for name in ("images.safetensors", "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert run("synthesize", "--config", config, "--method.ipc", 2, "--out", tmp_path / "c") == 0
    assert dd.SyntheticDataset.load(tmp_path / "c").ipc == 2


def test_methods_and_show(capsys):
    assert run("methods", "R*") == 0
    assert capsys.readouterr().out.startswith("RandomReal")
    assert run("show", "dm") == 0
    said = capsys.readouterr().out
    for text in ("arXiv 2110.04181", "real_batch", "int >= 1, default 256", "Outer steps.", "cifar10/ipc10"):
        assert text in said


def test_show_explains_settings_of_settings(capsys):
    assert run("show", "EVLF") == 0
    assert "dsdistill show EVLF.models (sampler, fusion, redraw likewise)" in capsys.readouterr().out
    assert run("show", "evlf.models.weights") == 0
    said = capsys.readouterr().out
    for text in ("Weights: Which pretrained", "path", "str, required", "--method.models.weights.NAME VALUE"):
        assert text in said
    assert run("show", "DM.form", "--json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["classes"]] == ["Plain", "Tiled"]
    for place, message in (("EVLF.ipc", "int >= 1"), ("EVLF.modls", "'models'"), ("EVLF.models.size", "'nano'")):
        assert run("show", place) == 2
        assert message in capsys.readouterr().err


def test_help_lists_methods_and_not_what_they_share(capsys):
    with pytest.raises(SystemExit):
        run("synthesize", "--help")
    said = capsys.readouterr().out
    assert "methods.EVLF" in said
    assert not re.search("Drawing|Guided", said)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_there_for_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*([verb] if verb else []), "--help")
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert not re.search(r"Annotated\[|<class", said)
    if verb:
        assert "Examples:" in said
        assert "--config" in said
        assert "--json" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "DMM"], 2, "unknown method 'DMM'; did you mean 'DM'"),
        (["--method", "DM", "--method.icp", "1"], 2, "unknown setting of DM 'icp'; did you mean 'ipc'"),
        (["--method", "DM", "--method.ipc", "0"], 2, "greater than or equal to 1; got '0'"),
        (["--method", "DM", "--method.ipc", "ten"], 2, "valid integer.*got 'ten'"),
        (["--method", "DM", "--method.on_small_class", "x"], 2, "'error', 'cap', 'duplicate'"),
        (
            ["--method", "DM", "--method.network.name", "convnett"],
            2,
            "unknown network 'convnett'; did you mean 'convnet'",
        ),
        (["--method", "DM", "--method.network.norm", "instanc"], 2, "'none', 'batch', 'layer', 'instance', 'group'"),
        (["--method", "DM", "--methd.ipc", "1"], 2, "did you mean '--method"),
        (["--method", "DM", "--seed", "one"], 2, "seed"),
        (["--method", "DM", "--chunk", "0"], 2, "chunk = 0"),
        (["--method", "DM", "--device", "cuda:77"], 2, "device 'cuda:77'"),
        (["--method", "DM", "--method.ipc", "50"], 3, "fewer than ipc=50 images"),
        (["--method", "DM", "--data", "digitz"], 2, "unknown dataset 'digitz'; did you mean 'digits'"),
        (["--method", "DM", "--data", "./no/such/folder"], 3, "no such folder"),
        (["--method", "DM", "--load.holdout", "2"], 2, "less than 1"),
    ],
)
def test_bad_input_is_named_before_any_work(arguments, code, message, images, tmp_path, capsys):
    found, said = refused(capsys, "synthesize", "--data", images, "--out", tmp_path / "out", *arguments)
    assert found == code
    assert re.search(message, said, re.DOTALL), said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 12
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--baselines", "randm"], 2, "unknown baseline 'randm'; did you mean 'random'"),
        (["--protocol", "dsaa"], 2, "unknown protocol 'dsaa'; did you mean 'dsa'"),
        (["--repeats", "0"], 2, "repeats = 0"),
        (["--epochs", "0"], 2, "greater than or equal to 1"),
        (["--data", "digits"], 3, "score a set on the data it was made from"),
    ],
)
def test_bad_evaluations_are_named(arguments, code, message, images, tmp_path, capsys):
    run("synthesize", "--data", images, "--method", "RandomReal", "--method.ipc", 1, "--out", tmp_path / "set")
    capsys.readouterr()
    found, said = refused(capsys, "evaluate", tmp_path / "set", "--data", images, *arguments)
    assert (found, re.search(message, said) is not None) == (code, True), said


def test_a_pickle_offered_as_a_set_is_refused_unopened(tmp_path, capsys):
    canary = tmp_path / "canary"
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    code, said = refused(capsys, "inspect", tmp_path / "evil.pt")
    assert code == 6
    assert "never read" in said
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch {canary}']",
        "method: {{class_path: os.system, init_args: {{command: 'touch {canary}'}}}}",
        "nonsense: 1",
        "seed: [unclosed",
    ],
)
def test_a_hostile_or_broken_config_is_refused(text, images, tmp_path, capsys):
    config, canary = tmp_path / "bad.yaml", tmp_path / "canary"
    config.write_text(text.format(canary=canary))
    code, said = refused(capsys, "synthesize", "--config", config, "--data", images, *SMALL, "--out", tmp_path / "out")
    assert code == 2
    assert "Traceback" not in said
    assert not canary.exists()


def test_another_run_in_the_folder_is_refused_unless_overwritten(images, tmp_path, capsys):
    command = ["synthesize", "--data", images, "--method", "RandomReal", "--out", tmp_path / "set"]
    assert run(*command, "--method.ipc", 1) == 0
    assert run(*command, "--method.ipc", 1) == 0
    code, said = refused(capsys, *command, "--method.ipc", 2)
    assert code == 2
    assert "method.ipc: 1 -> 2" in said
    assert run(*command, "--method.ipc", 2, "--overwrite") == 0
    assert dd.SyntheticDataset.load(tmp_path / "set").ipc == 2


def test_a_diverging_run_exits_with_4(images, tmp_path, capsys):
    options = [*SMALL, *NETWORK, "--method.network.norm", "none", "--method.lr_images", "1e38"]
    code, said = refused(capsys, "synthesize", "--data", images, *options, "--out", tmp_path / "out")
    assert code == 4
    assert "last good state is saved in" in said
    assert run("inspect", tmp_path / "out" / "run" / "last-good") == 0
    assert "NOT FINISHED" in capsys.readouterr().out


def test_an_interrupt_outside_a_run_exits_with_130(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "methods", verbs.Verb("help", "", VERBS["methods"].arguments, interrupt))
    assert run("methods") == 130


def test_quickstart_leaves_everything_in_its_folder(tmp_path, capsys, monkeypatch):
    from dsdistill.cli import quickstart

    monkeypatch.setattr(quickstart, "ITERATIONS", 2)
    monkeypatch.setattr(quickstart, "EPOCHS", {"epochs": 1, "whole_epochs": 1})
    monkeypatch.setattr(quickstart, "REPEATS", 2)
    assert run("quickstart", "--out", tmp_path / "q") == 0
    said = capsys.readouterr().out
    assert "whole training set" in said
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert {"dataset.json", "images.safetensors", "README.md", "grid.png", "results.json"} <= names
    assert json.loads((tmp_path / "q" / "results.json").read_text())["gain_over_random"]["n"] == 2


@pytest.mark.slow
def test_quickstart_beats_random_beyond_the_interval(tmp_path):
    assert run("quickstart", "--out", tmp_path / "q") == 0
    gain = json.loads((tmp_path / "q" / "results.json").read_text())["gain_over_random"]
    assert gain["mean"] - gain["ci95"] > 0


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "dsdistill", "methods"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "RandomReal" in done.stdout


def test_text_that_a_terminal_cannot_show_does_not_fail(images, tmp_path):
    out = tmp_path / "set"
    run("synthesize", "--data", images, "--method", "RandomReal", "--method.ipc", 1, "--out", out)
    command = [sys.executable, "-m", "dsdistill", "inspect", str(out)]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert b"d\\xf6gs" in done.stdout


def test_the_suggested_command_can_be_pasted(images, tmp_path, capsys):
    out = tmp_path / "my set"
    options = ["--load.image_size", 6, "--load.mirror_safe", "false", "--method", "RandomReal", "--method.ipc", 1]
    assert run("synthesize", "--data", images, *options, "--out", out) == 0
    command = shlex.split(capsys.readouterr().out.partition("score it with: ")[2])
    assert command[:3] == ["dsdistill", "evaluate", str(out)]
    assert {"--load.image_size=6", "--load.mirror_safe=False"} <= set(command)
    assert run(*command[1:], "--epochs", 1, "--repeats", 1, "--network.width", 4, "--baselines", "none") == 0
    said = capsys.readouterr().out
    assert "random real images" not in said
    assert "protocol dsa (changed: epochs, network)" in said


def test_results_are_not_overwritten_unasked(images, tmp_path, capsys):
    run("synthesize", "--data", images, "--method", "RandomReal", "--method.ipc", 1, "--out", tmp_path / "set")
    score = tmp_path / "score.json"
    score.write_text("mine")
    options = ["--data", images, "--epochs", 1, "--repeats", 1, "--network.width", 4, "--out", score]
    code, said = refused(capsys, "evaluate", tmp_path / "set", *options)
    assert (code, score.read_text()) == (2, "mine")
    assert "--overwrite" in said
    assert run("evaluate", tmp_path / "set", *options, "--overwrite") == 0
    assert json.loads(score.read_text())["format"] == "dsdistill.evaluation"


def test_a_factory_of_another_signature_is_told_how_it_is_called(images, tmp_path, capsys, monkeypatch):
    (tmp_path / "somebodys_nets.py").write_text("def make(shape, num_classes, size): ...")
    monkeypatch.syspath_prepend(tmp_path)
    options = [*SMALL, "--method.network.name", "somebodys_nets:make", "--out", tmp_path / "out"]
    code, said = refused(capsys, "synthesize", "--data", images, *options)
    assert code == 2
    assert "called as factory((3, 8, 8), 2)" in said


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m dsdistill show DM --json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == '{\n  "name"'
    assert done.stderr == ""


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as exit:
        run("--version")
    assert exit.value.code == 0
    assert dd.__version__ in capsys.readouterr().out
