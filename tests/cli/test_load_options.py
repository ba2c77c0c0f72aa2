"""How the settings of `dsdistill.data.load` are written on the command line."""

import dataclasses
import inspect

import pytest

from dsdistill.cli.options import LoadOptions
from dsdistill.cli.parser import Parser
from dsdistill.data import load


def parsed(*arguments):
    parser = Parser(prog="dsdistill")
    parser.add_class_arguments(LoadOptions, "load")
    return parser.parse_args([str(argument) for argument in arguments]).load


def test_every_option_is_an_argument_of_load_with_the_same_default():
    arguments = inspect.signature(load).parameters
    for field in dataclasses.fields(LoadOptions):
        assert arguments[field.name].default == field.default, field.name


@pytest.mark.parametrize(("text", "size"), [("32", 32), ("[32,48]", (32, 48)), ("[32, 48]", (32, 48)), ("null", None)])
def test_image_size(text, size):
    assert parsed("--load.image_size", text).image_size == size


def test_the_other_choices():
    options = parsed("--load.resize", "pad", "--load.storage", "cache", "--load.on_bad_image", "skip")
    assert (options.resize, options.storage, options.on_bad_image, options.max_skipped) == (
        "pad",
        "cache",
        "skip",
        0.05,
    )
    assert parsed("--load.max_skipped", 0.5).max_skipped == 0.5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", "[32]"),
        ("image_size", "large"),
        ("resize", "bend"),
        ("storage", "cloud"),
        ("on_bad_image", "hide"),
        ("max_skipped", "2"),
    ],
)
def test_what_is_none_of_them_is_refused(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(f"--load.{option}", value)
    assert caught.value.code == 2
    assert f"load.{option}" in capsys.readouterr().err
