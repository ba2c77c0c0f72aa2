"""jsonargparse's parser with our texts: short errors with the nearest name, types as humans write them."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader, set_parsing_settings

_load_yaml = get_loader("yaml")


_DEEPEST = 50  # levels of a configuration; settings have less than ten
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def _load_plain_yaml(text: str) -> Any:
    """YAML in which everything is written out, and nothing is deep.

    A few aliases of aliases would make terabytes of a small file.
    """
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError("aliases (*name) are not read: write the value out")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {_DEEPEST} levels")
    try:
        return _load_yaml(text)
    except ValueError as error:  # an integer of thousands of digits
        raise yaml.YAMLError(str(error)) from None


set_parsing_settings(docstring_parse_attribute_docstrings=True)
set_loader("yaml", _load_plain_yaml, exceptions=(yaml.YAMLError,))


class HelpFormatter(DefaultHelpFormatter):
    """Writes ``int >= 1`` for ``Annotated[int, Ge(ge=1)]`` and leaves examples as they are."""

    def _expand_help(self, action: Any) -> str:
        return _plain_types(super()._expand_help(action))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Examples:") else super()._fill_text(text, width, indent)


class Parser(ArgumentParser):
    """An argument parser that says in a few lines what is wrong and which name was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2 after the problem, the nearest name and where help is."""
        if not self.exit_on_error:  # one of several readings that the library tries
            super().error(message, ex)
        command = self.prog.replace(" [options]", "")
        print(f"{command}: error: {_shortened(message)}{_suggestion(message, self)}", file=sys.stderr)
        print(f"Help: {command} --help", file=sys.stderr)
        raise SystemExit(2)


def _plain_types(text: str) -> str:
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}

    def rewrite(match: re.Match[str]) -> str:
        limits = [f"{signs[kind]} {value}" for kind, value in re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([^)]*)\)", match[2])]
        return f"{match[1]} {', '.join(limits)}"

    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return re.sub(r"Annotated\[(\w+), ((?:(?:Ge|Gt|Le|Lt)\(\w+=[^)]*\)(?:, )?)+)\]", rewrite, text)


# What the library reports of the readings it tried, without a word on the user's mistake.
_NOISE = re.compile(
    r"Does not validate against any of the Union|Subtypes:|Errors:$|- Expected a NoneType|Given value( type)?:"
    r"|Expected a dot import path string|For further information|\d+ validation errors? for constrained"
    r"|- Expected a path but"
)


def _shortened(message: str) -> str:
    lines = [line for line in _plain_types(message).splitlines() if line.strip() and not _NOISE.search(line)]
    text = "\n".join(re.sub(r" \[type=\w+, input_value=(.*), input_type=\w+\]", r"; got \1", line) for line in lines)
    return re.sub(r"(arguments are required: )\w+\.(\w+)", r"\1--\2", text)


def _suggestion(message: str, parser: ArgumentParser) -> str:
    from dsdistill.core.config import describe
    from dsdistill.methods import get_method, list_methods

    unknown_method = re.search(r"Expected a dot import path string: '?([\w.]+)", message)
    if unknown_method:
        return _nearest("method", unknown_method[1], list_methods())
    unknown_field = re.search(r"(?:Option|Key|Parser key) [\"']([\w.]+)[\"'] is not (?:accepted|expected)", message)
    if unknown_field:
        known = {field.name for name in list_methods() for field in describe(get_method(name))}
        return _nearest("setting", unknown_field[1].rpartition(".")[2], sorted(known))
    unknown_option = re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", message)
    if unknown_option:
        return _nearest("option", unknown_option[1], sorted(_options(parser)), list_all=False)
    return ""


def _options(parser: argparse.ArgumentParser) -> Iterable[str]:
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _options(verb)


def _nearest(kind: str, name: str, known: list[str], *, list_all: bool = True) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    guess = f"; did you mean {folded[near[0]]!r}?" if near else "."
    return f"\nunknown {kind} {name!r}{guess}" + (f" Known: {', '.join(known)}." if list_all else "")
