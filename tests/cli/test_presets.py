"""Presets on the command line, and methods within methods."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest

from dsdistill import methods
from dsdistill.cli.main import build_parser, main
from dsdistill.engine import PerClass, Preset, Synthesizer
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Plain, Tiled

MAKE = ["synthesize", "--data", "digits", "--out", "never"]


@dataclass(frozen=True, kw_only=True)
class ToyWrapper(Synthesizer):
    """Holds another method."""

    paper: ClassVar[str] = "none"
    base: Synthesizer
    """The method within."""
    twice: bool = False
    """A setting of its own."""

    def start(self, run, job):
        return self.base.start(run, job)


@dataclass(frozen=True, kw_only=True)
class ToyTiles(PerClass):
    """Has a preset of every kind of setting."""

    paper: ClassVar[str] = "none"
    presets: ClassVar[Mapping[str, Preset]] = {
        "toy/ipc3": Preset(
            "table 1",
            {"ipc": 3, "form": Tiled(factor=3), "network": NetworkSpec(norm="batch"), "shares": (0.5, 1), "kind": "b"},
        ),
        "toy/ipc4/code": Preset("main.py", {"ipc": 4, "network": None}),
        "paper": Preset("table 1", {}),
    }
    network: NetworkSpec | None = NetworkSpec(width=8)
    """A network."""
    shares: tuple[float, ...] = ()
    """Numbers."""
    kind: str = "a"
    """A name."""

    def start(self, run, job):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods._registry, "_added", {"ToyWrapper": ToyWrapper, "ToyTiles": ToyTiles})


def configured(*arguments):
    """The method that arguments lead to."""
    parser = build_parser()
    return parser.instantiate(parser.parse_args([*MAKE, *map(str, arguments)])).synthesize.method


def refused(capsys, *arguments):
    try:
        code = main([*MAKE, *map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "ToyTiles", "--preset", "toy/ipc3"],
        ["--preset", "toy/ipc3", "--method", "ToyTiles"],
        ["--method=ToyTiles", "--preset=toy/ipc3"],
        ["--method", "ToyTiles", "--preset", "toy/ipc4/code", "--preset", "toy/ipc3"],
    ],
)
def test_a_preset_is_the_settings_that_the_method_lists(arguments):
    assert configured(*arguments) == ToyTiles.preset("toy/ipc3")


def test_a_preset_may_leave_something_out():
    assert configured("--method", "ToyTiles", "--preset", "toy/ipc4/code").network is None


def test_a_printed_config_holds_the_settings_and_no_preset(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        main([*MAKE, "--method", "ToyWrapper+ToyTiles", "--preset", "toy/ipc3", "--print_config"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "preset:" not in printed
    (tmp_path / "run.yaml").write_text(printed)
    assert configured("--config", "run.yaml").base == ToyTiles.preset("toy/ipc3")


def test_settings_on_the_command_line_win_wherever_they_stand():
    changes = ["--method.ipc", 5, "--method.form.factor", 2, "--method.network.width", 4]
    for arguments in (["--preset", "toy/ipc3", *changes], [*changes, "--preset", "toy/ipc3"]):
        changed = configured("--method", "ToyTiles", *arguments)
        assert (changed.ipc, changed.form, changed.kind) == (5, Tiled(factor=2), "b")
        assert changed.network == NetworkSpec(norm="batch", width=4)


def test_presets_of_every_method_can_be_given():
    listed = {name: [*methods.get_method(name).presets] for name in methods.list_methods()}
    for name in filter(listed.get, listed):
        preset = listed[name][-1]
        assert configured("--method", name, "--preset", preset) == methods.get_method(name).preset(preset)


def test_a_preset_is_for_the_method_within_where_the_wrapper_has_none():
    wrapped = ["--method", "ToyWrapper", "--method.base", "ToyTiles", "--preset", "toy/ipc3"]
    assert configured(*wrapped, "--method.twice", "true") == ToyWrapper(base=ToyTiles.preset("toy/ipc3"), twice=True)
    short = configured("--method", "ToyWrapper+ToyTiles", "--preset", "toy/ipc3", "--method.base.kind", "c")
    assert short.base == ToyTiles.preset("toy/ipc3", kind="c")


def test_a_wrapper_with_presets_takes_its_own(monkeypatch):
    monkeypatch.setattr(ToyWrapper, "presets", {"toy/ipc3": Preset("its own", {"twice": True})})
    made = configured("--method", "ToyWrapper+ToyTiles", "--preset", "toy/ipc3")
    assert made == ToyWrapper(base=ToyTiles(), twice=True)


def test_files_of_settings_before_the_method_are_changed_by_it_and_those_after_win(tmp_path):
    (tmp_path / "run.yaml").write_text("method: {class_path: ToyTiles, init_args: {ipc: 7, kind: z}}")
    file, preset = ["--config", "run.yaml"], ["--method", "ToyTiles", "--preset", "toy/ipc4/code"]
    first, last = configured(*file, *preset), configured(*preset, *file)
    assert (first.ipc, first.kind) == (4, "z")
    assert (last.ipc, last.kind, last.network) == (7, "z", None)


def test_mistakes_in_presets(capsys):
    code, said = refused(capsys, "--method", "ToyTiles", "--preset", "toy/ipc5")
    assert (code, "unknown preset of ToyTiles 'toy/ipc5'; did you mean 'toy/ipc3'" in said) == (2, True), said
    code, said = refused(capsys, "--method", "RandomReal", "--preset", "toy/ipc3")
    assert (code, "unknown preset of RandomReal 'toy/ipc3'. Known: none." in said) == (2, True), said
    code, said = refused(capsys, "--preset", "toy/ipc3")
    assert (code, "--method NAME --preset" in said) == (2, True), said
    code, said = refused(capsys, "--method", "DMM", "--preset", "toy/ipc3")
    assert (code, "unknown method 'DMM'" in said or "--method NAME" in said) == (2, True), said
    code, said = refused(capsys, "--method", "ToyTiles", "--preset")
    assert (code, "expected one argument" in said) == (2, True), said


def test_an_unknown_preset_is_told_as_json(capsys):
    assert main([*MAKE, "--method", "ToyTiles", "--preset", "toy/ipc5", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UnknownName"


@pytest.mark.parametrize("given", [["run.yaml"], ["run.yaml", "--print_config"], ["{preset: toy/ipc3}"]])
def test_a_preset_in_a_file_of_settings_is_refused(given, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("preset: toy/ipc3")
    code, said = refused(capsys, "--method", "ToyTiles", "--config", *given)
    assert (code, "a file holds the settings themselves" in said) == (2, True), said


def test_help_names_the_option(capsys):
    with pytest.raises(SystemExit):
        main(["synthesize", "--help"])
    assert re.search(r"--preset NAME\s+Published settings of the method", capsys.readouterr().out)


def test_show_tells_presets_with_their_source_and_settings_without_default(capsys):
    assert main(["show", "ToyTiles"]) == 0
    said = capsys.readouterr().out
    changes = r"ipc=3, form=Tiled\(factor=3\), network\.width=None, network\.norm='batch'"
    assert re.search(rf"from table 1\n +toy/ipc3 +{changes}", said)
    assert re.search(r"'b'\n +paper +the defaults\n", said)
    assert re.search(r"from main.py\n +toy/ipc4/code +ipc=4, network=None", said)
    assert "--preset toy/ipc3" in said
    assert main(["show", "ToyTiles", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["presets"]
    assert shown["toy/ipc4/code"] == {"source": "main.py", "settings": {"ipc": 4, "network": None}}
    assert main(["show", "ToyWrapper"]) == 0
    assert re.search(r"base +Synthesizer, required", capsys.readouterr().out)
    assert main(["show", "ToyWrapper", "--json"]) == 0
    base, twice = json.loads(capsys.readouterr().out)["settings"]
    assert (base["required"], base["default"], twice["required"], twice["default"]) == (True, None, False, False)


def test_settings_of_a_method_within_another():
    options = ["--method", "ToyWrapper", "--method.base", "DM", "--method.base.ipc", 2]
    options += ["--method.base.network", "lenet", "--method.base.augmentation", "null"]
    options += ["--method.base.parameterization", "tiles", "--method.base.parameterization.factor", 3]
    made = configured(*options)
    assert made.base == methods.DM(ipc=2, network=NetworkSpec("lenet"), augmentation=None, form=Tiled(factor=3))
    assert configured(*options, "--method.base.form", "pixels").base.form == Plain()
    deep = configured("--method", "ToyWrapper+ToyWrapper+RandomReal", "--method.base.base.ipc", 4)
    assert deep.base.base == methods.RandomReal(ipc=4)


def test_nothing_is_a_value_at_any_depth():
    options = ["--method", "ToyWrapper+KMeans", "--method.base.extractor.network.norm", "null"]
    assert configured(*options, "--method.base.extractor.training", "null").base.extractor.training is None
    recipe = configured(*options, "--method.base.extractor.training.augmentation", "null").base.extractor.training
    assert (recipe.epochs, recipe.augmentation) == (20, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ToyWrapper"], r"required: --method\.base\nHelp: dsdistill synthesize"),
        (["--method", "ToyWrapper", "--method.base", "DMM"], "unknown method 'DMM'; did you mean 'DM'"),
        (["--method", "ToyWrapper", "--method.base.ipc", "1"], r"give --method\.base NAME .*base: {class_path: DM,"),
        (["--method", "ToyWrapper+DM", "--method.base.icp", "1"], "setting of DM 'icp'; did you mean 'ipc'"),
        (["--method", "ToyWrapper+DM", "--method.base.ipc", "x"], "valid integer.*got 'x'"),
        (["--method", "ToyWrapper+DM", "--method.twic", "true"], "setting of ToyWrapper 'twic'; did you mean 'twice'"),
        (["--method", "ToyWrapper+DM", "--method.bass.ipc", "1"], "setting of ToyWrapper 'bass'; did you mean 'base'"),
        (["--method", "ToyWrapper+DM", "--method.base.form", "tiled"], "unknown form 'tiled'; did you mean 'Tiled'"),
        (["--method", "ToyWrapper+DM", "--method.base.network", "lenett"], "unknown network 'lenett'; .*'lenet'"),
        (["--method", "ToyWrapper+DM", "--method.base.network.wdth", "1"], "of NetworkSpec 'wdth'; .*'width'"),
        (["--method", "DM", "--method.network", "lenet.yaml"], r"given as --method\.network\.name NAME"),
        (["--method", "DM", "--method.network", "{wdth: 1}"], "of NetworkSpec 'wdth'; .*'width'"),
        (["--method", "KMeans", "--method.extractor.training.epoch", "1"], "TrainingRecipe 'epoch'; .*'epochs'"),
        (["--method", "KMeans", "--method.extractor.training", "long"], r"own: --method\.extractor\.training\.SETTING"),
        (["--method", "DM", "--method.network.nam", "lenet"], "of NetworkSpec 'nam'; did you mean 'name'"),
        (["--method", "DM", "--chun", "3"], "unknown option '--chun'; did you mean '--chunk'"),
    ],
)
def test_mistakes_in_nested_settings(arguments, message, capsys):
    code, said = refused(capsys, *arguments)
    assert (code, re.search(message, said, re.DOTALL) is not None) == (2, True), said
    assert "abstract" not in said
    assert len(said.splitlines()) < 12
