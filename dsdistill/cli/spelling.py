"""What people write on a command line, in the spelling that the parser reads."""

import re
from collections.abc import Sequence

_NETWORKS = ("--network", "--method.network")
_LISTS = ("--classes", "--mean", "--std")
_SIZE = "--load.image_size"


def as_parsed(arguments: Sequence[str]) -> list[str]:
    """Arguments with three short forms written out; all others stay as they are.

    ``--network NAME`` names a network, ``--load.image_size 24,40`` or ``24x40`` gives height and width, and
    ``--classes cat,dog`` (``--mean``, ``--std``) lists values.
    """
    written: list[str] = []
    option = ""  # whose value comes next
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            if equals:
                argument, option = "=".join(_written_out(option, value)), ""
        elif option:
            written[-1], argument = _written_out(option, argument)
            option = ""
        written.append(argument)
    return written


def _written_out(option: str, value: str) -> tuple[str, str]:
    if value == "null" or value.startswith(("[", "{")):
        return option, value
    if option in _NETWORKS and not value.endswith((".yaml", ".yml", ".json")):
        return f"{option}.name", value
    if option == _SIZE and (sides := re.fullmatch(r"\s*(\d+)\s*[x,]\s*(\d+)\s*", value)):
        return option, f"[{sides[1]}, {sides[2]}]"
    if option in _LISTS and "," in value:
        return option, f"[{value}]"
    return option, value
