"""jsonargparse's parser with our exit texts: the nearest name for a typing error, types as humans write them."""

import difflib
import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class HelpFormatter(DefaultHelpFormatter):
    """Writes ``int >= 1`` for ``Annotated[int, Ge(ge=1)]``."""

    def _expand_help(self, action: Any) -> str:
        return _plain_types(super()._expand_help(action))


class Parser(ArgumentParser):
    """An argument parser that suggests the name its user may have meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(_plain_types(message) + _suggestion(message), ex)


def _plain_types(text: str) -> str:
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}

    def rewrite(match: re.Match[str]) -> str:
        limits = [f"{signs[kind]} {value}" for kind, value in re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([^)]*)\)", match[2])]
        return f"{match[1]} {', '.join(limits)}"

    return re.sub(r"Annotated\[(\w+), ((?:(?:Ge|Gt|Le|Lt)\(\w+=[^)]*\)(?:, )?)+)\]", rewrite, text)


def _suggestion(message: str) -> str:
    from dsdistill.core.config import describe
    from dsdistill.methods import get_method, list_methods

    unknown_method = re.search(r"(?:dot import path string|Unexpected class path|Import path): '?([\w.]+)", message)
    if unknown_method:
        return _nearest("method", unknown_method[1], list_methods())
    unknown_field = re.search(r"(?:Option|Key|Parser key) '([\w.]+)' is not (?:accepted|expected)", message)
    if unknown_field:
        known = [field.name for name in list_methods() for field in describe(get_method(name))]
        return _nearest("setting", unknown_field[1].rpartition(".")[2], sorted(set(known)))
    return ""


def _nearest(kind: str, name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    guess = f"; did you mean {folded[near[0]]!r}?" if near else "."
    return f"\nunknown {kind} {name!r}{guess} Known: {', '.join(known)}."
