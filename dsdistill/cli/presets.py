"""Published settings by name: ``--preset cifar10/ipc10`` stands for the settings that the method lists under it."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionFail, ArgumentParser

from dsdistill.cli.configured import as_configured
from dsdistill.errors import InvalidSetting, UnknownName

if TYPE_CHECKING:
    from dsdistill.engine import Synthesizer

_OPTION = "--preset"


def preset_argument(parser: ArgumentParser) -> None:
    """The option, for the help; `with_preset` has replaced it before anything is parsed."""
    parser.add_argument(
        _OPTION,
        action=ActionFail(f"a preset is given beside its method: --method NAME {_OPTION} PRESET"),
        metavar="NAME",
        help="Published settings of the method, such as cifar10/ipc10 (see: dsdistill show NAME); settings that are "
        "given on the command line win.",
    )


def refuse_preset(settings: Mapping[str, Any]) -> None:
    """Refuse a preset among settings of a file, where it would be read too late to come before all others.

    Raises:
        InvalidSetting: there is one.
    """
    if settings.get("preset") is not None:
        allowed = (
            f"a file holds the settings themselves (--print_config writes them), {_OPTION} is for the command line"
        )
        raise InvalidSetting("preset", settings["preset"], allowed)


def with_preset(arguments: Sequence[str]) -> list[str]:
    """Arguments with the settings of a preset in its place, right after the method, so that all others win.

    A method without presets that wraps another (``--method FYI --method.base DM``) leaves them to that one. Arguments
    that name no known method, or no preset, stay as they are.

    Raises:
        UnknownName: the method has no such preset.
    """
    name = _last_value(arguments, _OPTION)
    if name is None or not (methods := _methods(arguments)):
        return list(arguments)
    option, place, cls = next((named for named in methods if named[2].presets), methods[-1])
    if name not in cls.presets:
        raise UnknownName(f"preset of {cls.__name__}", name, cls.presets)
    settings = [f"{option}.{key}={_text(value)}" for key, value in cls.presets[name].settings.items()]
    return [*_without(arguments[:place], _OPTION), *settings, *_without(arguments[place:], _OPTION)]


def _methods(arguments: Sequence[str]) -> "list[tuple[str, int, type[Synthesizer]]]":
    """Option, place behind it, and class of every method that is named, the outermost first."""
    from dsdistill.methods import get_method, is_method

    found: dict[str, tuple[str, int, type[Synthesizer]]] = {}
    for place, option, value in _options(arguments):
        name = value.rpartition(".")[2]  # of a class path too
        if option.replace(".base", "") == "--method" and is_method(name):
            found[option] = (option, place, get_method(name))
    return list(found.values())


def _options(arguments: Sequence[str]) -> list[tuple[int, str, str]]:
    """Options with their values, ``--name value`` or ``--name=value``, and the place behind each."""
    found = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if argument.startswith("--") and equals:
            found.append((index + 1, option, value))
        elif argument.startswith("--") and index + 1 < len(arguments):
            found.append((index + 2, option, arguments[index + 1]))
    return found


def _last_value(arguments: Sequence[str], name: str) -> str | None:
    return next((value for _, option, value in reversed(_options(arguments)) if option == name), None)


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """Arguments without an option and its value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != name:
            kept.append(argument)
        skip = argument == name
    return kept


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(as_configured(value))
