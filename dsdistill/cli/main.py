"""``dsdistill VERB``: parsers come from the typed settings through jsonargparse, work is done by the library."""

import json
import logging
import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from dsdistill import __version__
from dsdistill.cli.parser import Parser
from dsdistill.cli.verbs import VERBS
from dsdistill.errors import DistillError, InvalidSetting


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (see `dsdistill.errors`)."""
    logging.basicConfig(format="dsdistill: %(message)s", level=logging.WARNING)
    logging.getLogger("dsdistill").setLevel(logging.INFO)
    parser = build_parser()
    config = parser.parse_args(arguments)
    verb, settings = config.subcommand, config[config.subcommand]
    try:
        settings = _instantiated(parser, config)[verb]
        result = VERBS[verb].run(settings)
        if settings.get("json"):
            print(json.dumps(result, indent=2, ensure_ascii=True))
        sys.stdout.flush()
    except DistillError as error:
        return _fail(error, as_json=bool(settings.get("json")))
    except KeyboardInterrupt:
        print("dsdistill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _instantiated(parser: ArgumentParser, config: Namespace) -> Namespace:
    try:
        instantiated: Namespace = parser.instantiate(config)
        return instantiated
    except ValueError as error:  # the library wraps what our settings raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DistillError):
            cause = cause.__cause__ or cause.__context__
        raise cause or InvalidSetting("configuration", str(config), str(error)) from None


def _fail(error: DistillError, as_json: bool) -> int:
    code = error.exit_code
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error), "exit_code": code}))
    print(f"dsdistill: {type(error).__name__}: {error}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


def build_parser() -> ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="dsdistill",
        version=__version__,
        description="Distil an image dataset into a few images per class, and score the result.",
    )
    verbs = parser.add_subcommands(title="verbs", metavar="VERB")
    for name, verb in VERBS.items():
        sub = Parser(prog=f"dsdistill {name}", description=verb.help, epilog=f"Examples:\n{verb.examples}")
        sub.add_argument("--config", action="config", help="YAML file of settings; flags after it win.")
        verb.arguments(sub)
        sub.add_argument("--json", action="store_true", help="Print the result as JSON on standard output.")
        verbs.add_subcommand(name, sub, help=verb.help)
    return parser
