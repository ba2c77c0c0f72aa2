"""What the parser's library reports, said in a few lines: the problem, the nearest name, and what would do."""

import argparse
import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

_BRACKETS = "(quoted, because shells expand brackets)"
_SYNTAX = {
    "load.image_size": f"one number of pixels, or height and width: '[24,40]' {_BRACKETS}, 24,40 or 24x40",
    "classes": f"names in label order: '[cat, dog]' {_BRACKETS} or cat,dog",
    "mean": f"a number per channel: '[0.5, 0.4, 0.3]' {_BRACKETS} or 0.5,0.4,0.3",
    "std": f"a number per channel: '[0.2, 0.2, 0.2]' {_BRACKETS} or 0.2,0.2,0.2",
}
_METHODS = ("method", "base")  # settings that are methods
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

    The parser of all verbs makes it, and names them ``VERB.NAME``; a setting that a method requires is named alone,
    behind the method's own key.
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
    names, place = found[1].split(", "), _place(message)
    if place:
        owner = f"--{place.partition('.')[0]}"
        verb = next((name for name, one in verbs.items() if owner in one._option_string_actions), "")
        return verb, f"the following arguments are required: {', '.join(f'--{place}.{name}' for name in names)}"
    first = names[0].partition(".")[0]
    verb = first if first in verbs else ""
    names = [name.removeprefix(f"{verb}.") for name in names]
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
    text = re.sub(r"(- )?Expected an instantiatable class, but .* is abstract", r"\1its class is not named", message)
    lines = [line for line in plain_types(text).splitlines() if line.strip() and not _NOISE.search(line)]
    return "\n".join(re.sub(r" \[type=\w+, input_value=(.*), input_type=\w+\]", r"; got \1", line) for line in lines)


def _place(message: str) -> str:
    """Where the complaint is about, from outermost to innermost: ``method.base.form``."""
    keys = re.findall(r"Parser key [\"']([\w.]+)[\"']", message)
    return ".".join(key for key, before in zip(keys, ["", *keys], strict=False) if key != before)


def _suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    place = _place(message)
    unknown_class = re.search(r"Expected a dot import path string: '?([\w.]+)|Unable to load config '(.*)'", message)
    if unknown_class:
        return _unknown_class(place, unknown_class[1] or unknown_class[2])
    if "is abstract" in message:
        key = place.rpartition(".")[2]
        name, settings = ("DM", "ipc: 1") if key in _METHODS else ("NAME", "SETTING: VALUE")
        return (
            f"\ngive --{place} NAME before its settings; "
            f"in YAML: {key}: {{class_path: {name}, init_args: {{{settings}}}}}"
        )
    unknown_field = re.search(r"(?:Option|Key|Parser key) [\"']([\w.]+)[\"'] is not (?:accepted|expected)", message)
    if unknown_field:
        return _unknown_field(message, unknown_field[1].rpartition(".")[2])
    unknown_part = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown_part:
        return _unknown_field(message, f"{unknown_part[1]}.{unknown_part[2]}")
    unknown_option = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", message)
    if unknown_option:
        if place:  # of a parser of a method's settings
            return _unknown_field(message, unknown_option[1])
        return _nearest("option", f"--{unknown_option[1]}", sorted(_options(parser)), list_all=False)
    if place in _SYNTAX:
        given = re.search(r"Given value: (.*)", message)
        return f"\n{f'got {given[1]!r}; ' if given else ''}give {_SYNTAX[place]}"
    return ""


def _unknown_class(place: str, name: str) -> str:
    from dsdistill.methods import list_methods
    from dsdistill.networks import list_networks

    key = place.rpartition(".")[2]
    if key == "network":
        unknown = "" if name in list_networks() else _nearest("network", name, list_networks())
        return f"{unknown}\na network is given as --{place}.name NAME; in YAML: network: {{name: NAME}}"
    if key in _METHODS:
        return _nearest("method", name, list_methods())
    base = next((base for known, base in _bases().items() if _is_at(place, known)), None)
    if base is None:
        return f"\n{key} has settings of its own: --{place}.SETTING VALUE"
    return _nearest(key, name, sorted(_concrete(base)))


def _is_at(place: str, known: str) -> bool:
    """Whether a place ends with a known one, or is its last part alone, as where a verb takes that by itself."""
    return f".{place}".endswith(f".{known}") or place == known.rpartition(".")[2]


def _unknown_field(message: str, name: str) -> str:
    """The nearest setting of the class in which it was looked for, or of all methods."""
    from dsdistill.core.config import describe

    classes = _settings_classes()
    owner = classes.get((re.findall(r"Problem with given class_path '[\w.]*?(\w+)'", message) or [""])[-1])
    if owner is None:
        known = {field.name for cls in classes.values() if _is_method(cls) for field in describe(cls)}
        return _nearest("setting", name, sorted(known))
    outer, _, inner = name.partition(".")
    while inner and (within := [cls for cls in _parts(owner, outer) if cls.__name__ in classes]):
        owner, (outer, _, inner) = within[0], inner.partition(".")
    return _nearest(f"setting of {owner.__name__}", outer, [field.name for field in describe(owner)])


def _settings_classes() -> dict[str, type[Any]]:
    """Every class of settings that a method may hold, its own included, by name."""
    from dsdistill.methods import get_method, list_methods

    found: dict[str, type[Any]] = {}
    waiting: list[type[Any]] = [get_method(name) for name in list_methods()]
    for base in _bases().values():
        waiting += _concrete(base).values()
    while waiting:
        cls = waiting.pop()
        if cls.__name__ not in found:
            found[cls.__name__] = cls
            waiting += [part for field in fields(cls) for part in _parts(cls, field.name)]
    return found


def _parts(cls: type[Any], name: str) -> list[type[Any]]:
    """Classes of settings that a setting of another may be: of ``NetworkSpec | None``, NetworkSpec."""
    hint = typing.get_type_hints(cls).get(name)
    return [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and is_dataclass(part)]


def _is_method(cls: type[Any]) -> bool:
    from dsdistill.engine import Synthesizer

    return issubclass(cls, Synthesizer)


def _bases() -> dict[str, type[Any]]:
    """Settings that are given by the name of a class, by the end of their place, and what that derives from."""
    from dsdistill.augmentations import Augmentation, Mix
    from dsdistill.experts import ExpertTraining
    from dsdistill.parameterizations import Form

    return {"form": Form, "augmentation": Augmentation, "mix": Mix, "experts.training": ExpertTraining}


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
