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
from dsdistill.core import storage
from dsdistill.core.device import is_out_of_memory
from dsdistill.errors import DistillError, InvalidSetting, OutOfMemory, OutOfSpace


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (see `dsdistill.errors`)."""
    _open_standard_streams()
    logging.basicConfig(format="dsdistill: %(message)s", level=logging.WARNING)
    logging.getLogger("dsdistill").setLevel(logging.INFO)
    parser = build_parser()
    try:
        config = parser.parse_args(arguments)
    except DistillError as error:
        return _fail(error, as_json="--json" in (sys.argv if arguments is None else arguments))
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
        _forget_output()
        return 0
    except (RuntimeError, MemoryError) as error:  # where no chunk could be made smaller: while loading, say
        if not is_out_of_memory(error):
            raise
        print(f"dsdistill: out of memory ({error or type(error).__name__}); free some", file=sys.stderr)
        return OutOfMemory.exit_code
    except OSError as error:
        if error.errno not in storage.FULL:
            raise
        _forget_output()
        print(f"dsdistill: the disk is full ({error}); free space and run the same command again", file=sys.stderr)
        return OutOfSpace.exit_code
    return 0


def _open_standard_streams() -> None:
    """Lead closed streams nowhere, lest a file of ours gets their number and the next message lands in it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _forget_output() -> None:
    """What standard output still holds cannot be written; Python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
