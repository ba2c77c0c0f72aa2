"""What the parser's library reports, said in a few lines: the problem, the nearest name, and what would do."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

_BRACKETS = "(quoted, because shells expand brackets)"
_SYNTAX = {
    "load.image_size": f"one number of pixels, or height and width: '[24,40]' {_BRACKETS}, 24,40 or 24x40",
    "classes": f"names in label order: '[cat, dog]' {_BRACKETS} or cat,dog",
    "mean": f"a number per channel: '[0.5, 0.4, 0.3]' {_BRACKETS} or 0.5,0.4,0.3",
    "std": f"a number per channel: '[0.2, 0.2, 0.2]' {_BRACKETS} or 0.2,0.2,0.2",
}
# What the library reports of the readings it tried, without a word on the user's mistake.
_NOISE = re.compile(
    r"Does not validate against any of the Union|Subtypes:|Errors:$|- Expected a NoneType|Given value( type)?:"
    r"|Expected a dot import path string|For further information|\d+ validation errors? for constrained"
    r"|- Expected a path but"
)


def explained(message: str, parser: argparse.ArgumentParser) -> str:
    """The library's message, shortened, with the nearest name of what was unknown or the syntax of what was read."""
    return f"{_shortened(message)}{_suggestion(message, parser)}"


def missing(message: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    """Verb and text of a complaint about arguments that are not there; empty if it is another complaint.

    The parser of all verbs makes it, and names them ``VERB.NAME``.
    """
    found = re.search(r"arguments are required: (.*)", message)
    if not found:
        return "", ""
    verbs = {
        name: verb
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, verb in action.choices.items()
    }
    first = found[1].partition(".")[0]
    verb = first if first in verbs else ""
    names = [name.removeprefix(f"{verb}.") for name in found[1].split(", ")]
    positional = {action.dest for action in verbs.get(verb, parser)._actions if not action.option_strings}
    listed = ", ".join(name.upper() if name in positional else f"--{name}" for name in names)
    return verb, f"the following arguments are required: {listed}"


def plain_types(text: str) -> str:
    """``int >= 1`` for ``Annotated[int, Ge(ge=1)]``, ``int`` for ``<class 'int'>``."""
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}

    def rewrite(match: re.Match[str]) -> str:
        limits = [f"{signs[kind]} {value}" for kind, value in re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([^)]*)\)", match[2])]
        return f"{match[1]} {', '.join(limits)}"

    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return re.sub(r"Annotated\[(\w+), ((?:(?:Ge|Gt|Le|Lt)\(\w+=[^)]*\)(?:, )?)+)\]", rewrite, text)


def _shortened(message: str) -> str:
    text = re.sub(r"- Expected an instantiatable class, but .* is abstract", "- its class is not named", message)
    lines = [line for line in plain_types(text).splitlines() if line.strip() and not _NOISE.search(line)]
    return "\n".join(re.sub(r" \[type=\w+, input_value=(.*), input_type=\w+\]", r"; got \1", line) for line in lines)


def _suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    key = (re.findall(r"Parser key [\"']([\w.]+)[\"']", message) or [""])[-1]
    unknown_class = re.search(r"Expected a dot import path string: '?([\w.]+)|Unable to load config '(.*)'", message)
    if unknown_class:
        return _unknown_class(key, unknown_class[1] or unknown_class[2])
    if "is abstract" in message:
        name, settings = ("DM", "ipc: 1") if key == "method" else ("NAME", "SETTING: VALUE")
        return (
            f"\ngive --{key} NAME before its settings; "
            f"in YAML: {key}: {{class_path: {name}, init_args: {{{settings}}}}}"
        )
    unknown_field = re.search(r"(?:Option|Key|Parser key) [\"']([\w.]+)[\"'] is not (?:accepted|expected)", message)
    if unknown_field:
        return _unknown_field(message, unknown_field[1].rpartition(".")[2])
    unknown_option = re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", message)
    if unknown_option:
        return _nearest("option", unknown_option[1], sorted(_options(parser)), list_all=False)
    if key in _SYNTAX:
        given = re.search(r"Given value: (.*)", message)
        return f"\n{f'got {given[1]!r}; ' if given else ''}give {_SYNTAX[key]}"
    return ""


def _unknown_class(key: str, name: str) -> str:
    from dsdistill.methods import list_methods
    from dsdistill.networks import list_networks

    if key == "network":
        unknown = "" if name in list_networks() else _nearest("network", name, list_networks())
        return f"{unknown}\na network is given as --network.name NAME; in YAML: network: {{name: NAME}}"
    bases = _bases()
    known = list_methods() if key == "method" else sorted(_concrete(bases[key])) if key in bases else []
    return _nearest(key, name, known, list_all=bool(known))


def _unknown_field(message: str, name: str) -> str:
    """The nearest setting of the class in which it was looked for, or of all methods."""
    from dsdistill.core.config import describe
    from dsdistill.methods import get_method, list_methods

    owner = (re.findall(r"Problem with given class_path '[\w.]*?(\w+)'", message) or [""])[-1]
    parts = {part: cls for base in _bases().values() for part, cls in _concrete(base).items()}
    if owner in parts:
        return _nearest(f"setting of {owner}", name, [field.name for field in describe(parts[owner])])
    known = {field.name for method in list_methods() for field in describe(get_method(method))}
    return _nearest("setting", name, sorted(known))


def _bases() -> dict[str, type[Any]]:
    """Settings that are given by the name of a class, and what it derives from."""
    from dsdistill.augmentations import Augmentation, Mix
    from dsdistill.parameterizations import Form

    return {"form": Form, "augmentation": Augmentation, "mix": Mix}


def _concrete(base: type[Any]) -> dict[str, Any]:
    found = {} if inspect.isabstract(base) else {base.__name__: base}
    for child in base.__subclasses__():
        found |= _concrete(child)
    return found


def _options(parser: argparse.ArgumentParser) -> Iterable[str]:
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _options(verb)


def _nearest(kind: str, name: str, known: Sequence[str], *, list_all: bool = True) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    guess = f"; did you mean {folded[near[0]]!r}?" if near else "."
    return f"\nunknown {kind} {name!r}{guess}" + (f" Known: {', '.join(known) or 'none'}." if list_all else "")
