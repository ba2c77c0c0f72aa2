"""What people write on a command line, in the spelling that the parser reads."""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import fields

_NETWORK = re.compile(r"--(\w+\.)*network")
_PARAMETERIZATION = re.compile(r"(--method(?:\.\w+)*)\.parameterization((?:\.\w+)*)")
_FORMS = {"pixels": "Plain", "tiles": "Tiled"}
_LISTS = ("--classes", "--mean", "--std")
_NUMBERS = ".class_ids"
_SIZE = "--load.image_size"


def as_parsed(arguments: Sequence[str]) -> list[str]:
    """Arguments with short forms and other names written out; all others stay as they are.

    ``--network NAME`` names a network, wherever it is a setting; ``--load.image_size 24,40`` or ``24x40`` gives height
    and width; ``--classes cat,dog`` (``--mean``, ``--std``, ``...class_ids``) lists values; ``--method FYI+DM`` wraps
    one method in another, whose settings may then be written ``--method.ipc``; ``--method.parameterization tiles``
    (``pixels``) is what papers call ``--method.form Tiled`` (``Plain``).
    """
    written: list[str] = []
    arguments = _within(arguments)
    option = ""  # whose value comes next
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = _renamed(argument).partition("=")
            if equals:
                written += ["=".join(pair) for pair in _written_out(option, value)]
                option = ""
            else:
                written.append(option)
        elif option:
            written.pop()
            written += [part for pair in _written_out(option, argument) for part in pair]
            option = ""
        else:
            written.append(argument)
    return written


def _within(arguments: Sequence[str]) -> list[str]:
    """After ``--method FYI+DM``, settings that DM has and FYI lacks are those of DM."""
    pairs = zip(arguments, [*arguments, ""][1:], strict=True)
    values = [b if a == "--method" else a.partition("=")[2] for a, b in pairs if a.partition("=")[0] == "--method"]
    if not values or "+" not in values[-1]:
        return list(arguments)
    from dsdistill.methods import get_method, is_method

    if not is_method(values[-1]):
        return list(arguments)
    *wrappers, innermost = values[-1].split("+")
    routed = {field.name for field in fields(get_method(innermost))} | {"parameterization"}
    routed -= {field.name for wrapper in wrappers for field in fields(get_method(wrapper))}
    inner = f"--method{'.base' * len(wrappers)}."
    return [
        inner + argument.removeprefix("--method.")
        if argument.startswith("--method.") and re.split(r"[.=]", argument)[1] in routed
        else argument
        for argument in arguments
    ]


def reread(arguments: Sequence[str]) -> list[str]:
    """Arguments that the library made of nested settings: it writes values as Python does and reads them as YAML."""
    return [_as_yaml(argument) for argument in arguments]


def _as_yaml(argument: str) -> str:
    option, _, value = argument.partition("=")
    if value != "None" and not value.startswith(("[", "{", "(")):
        return argument
    try:
        return f"{option}={json.dumps(ast.literal_eval(value))}"
    except (ValueError, SyntaxError, TypeError):
        return argument


def _renamed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    found = _PARAMETERIZATION.fullmatch(name)
    return f"{found[1]}.form{found[2]}{equals}{value}" if found else argument


def _written_out(option: str, value: str) -> list[tuple[str, str]]:
    """One option and its value as one or more that the parser reads."""
    if value == "null" or value.startswith(("[", "{")):
        return [(option, value)]
    if option == "--method" and "+" in value:
        return [(f"--method{'.base' * depth}", name) for depth, name in enumerate(value.split("+"))]
    if option.startswith("--method.") and option.endswith(".form"):
        return [(option, _FORMS.get(value.lower(), value))]
    if _NETWORK.fullmatch(option) and not value.endswith((".yaml", ".yml", ".json")):
        return [(f"{option}.name", value)]
    if option == _SIZE and (sides := re.fullmatch(r"\s*(\d+)\s*[x,]\s*(\d+)\s*", value)):
        return [(option, f"[{sides[1]}, {sides[2]}]")]
    if (option in _LISTS or option.endswith(_NUMBERS)) and "," in value:
        return [(option, f"[{value}]")]
    return [(option, value)]
