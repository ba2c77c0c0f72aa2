"""All verbs of the command line, in the order of the help."""

from dsdistill.cli import catalog, runs, sets
from dsdistill.cli.options import LoadOptions, Verb
from dsdistill.cli.options import data_arguments as _data_arguments

VERBS: dict[str, Verb] = {**runs.VERBS, **catalog.VERBS, **sets.VERBS}

__all__ = ["VERBS", "LoadOptions", "_data_arguments"]
