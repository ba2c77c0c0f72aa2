"""jsonargparse's parser with our texts: short errors with the nearest name, types as humans write them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings

from dsdistill.cli.configured import as_configured
from dsdistill.cli.messages import explained, missing, plain_types
from dsdistill.cli.presets import refuse_preset, with_preset
from dsdistill.cli.spelling import as_parsed, reread

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
        return plain_types(super()._expand_help(action))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Examples:") else super()._fill_text(text, width, indent)


class Parser(ArgumentParser):
    """An argument parser that says in a few lines what is wrong and which name was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2 after the problem, the nearest name and where help is."""
        if not self.exit_on_error:  # one of several readings that the library tries
            super().error(message, ex)
        command = self.prog.replace(" [options]", "")
        verb, told = missing(message, self)
        command = f"{command} {verb}".rstrip()
        print(f"{command}: error: {told or explained(message, self)}", file=sys.stderr)
        print(f"Help: {command} --help", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As the library's, after the arguments were brought into its spelling.

        Raises:
            UnknownName: the method has no preset of that name.
            InvalidSetting: a preset in a file of settings.
        """
        written = sys.argv[1:] if args is None else args
        # The library parses settings of settings with a parser of this class too, that does not exit on errors.
        read = with_preset(as_parsed(written)) if self.exit_on_error else reread(written)
        parsed: Namespace = super().parse_args(read, *others, **kwargs)
        if parsed.get("subcommand"):
            refuse_preset(parsed[parsed.subcommand])  # what no file held: --config '{preset: ...}', a pipe
        return parsed

    def dump(self, cfg: Namespace, *others: Any, **kwargs: Any) -> str:
        """As the library's, which cannot write settings that stand in a list (the stages of a chain)."""
        written = cfg.clone()
        for key, value in cfg.items():
            if isinstance(value, (list, tuple)) and any(map(is_dataclass, value)):
                written[key] = as_configured(value)
        text: str = super().dump(written, *others, **kwargs)
        return text

    def parse_path(self, path: str | os.PathLike[str], *others: Any, **kwargs: Any) -> Namespace:
        """Read a file of settings; what is wrong with it is said with its name."""
        try:
            if os.path.isfile(path):  # a pipe can be read once only, and the library will
                _require_settings(path)
            parsed: Namespace = super().parse_path(path, *others, **kwargs)
        except UnicodeDecodeError as error:
            raise TypeError(f"{path}: no text in UTF-8 ({error.reason} at byte {error.start})") from error
        return parsed


def _require_settings(path: str | os.PathLike[str]) -> None:
    try:
        content = _load_plain_yaml(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise TypeError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise TypeError(f"{path}: holds no settings; write them as lines such as 'seed: 1'")
    refuse_preset(content)
