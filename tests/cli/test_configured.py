"""What --print_config writes is read back as the same method."""

import pytest
import yaml

from dsdistill.cli.main import main
from dsdistill.engine import Synthesizer
from dsdistill.errors import BadData
from dsdistill.methods import get_method

NAMED = ["DataDAM", "IDC", "KMeans", "NCFM", "FYI+IDC"]  # settings in lists, in settings, in methods


@pytest.fixture
def caught(monkeypatch):
    """The methods that the command line hands to `synthesize`."""
    methods: list[Synthesizer] = []

    def catch(method, *_, **__):
        methods.append(method)
        raise BadData("caught")

    monkeypatch.setattr("dsdistill.synthesize", catch)
    return methods


@pytest.mark.parametrize("name", NAMED)
def test_a_printed_configuration_is_that_of_the_method(name, tmp_path, capsys, caught):
    command = ["synthesize", "--data", "digits", "--method", name, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main([*command, "--print_config"])
    printed = capsys.readouterr().out
    assert "Unable" not in printed
    assert yaml.safe_load(printed)["method"]["class_path"].endswith(name.split("+")[0])
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    for line in (command, ["synthesize", "--config", str(path)]):
        assert main(line) == 3  # bad data: nothing was made
    plain, read = caught
    assert read == plain
    assert plain == get_method(name)() if "+" not in name else plain.title == name
