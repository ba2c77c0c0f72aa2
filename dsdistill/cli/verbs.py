"""All verbs of the command line, in the order of the help."""

from dsdistill.cli import catalog, experts, runs, sets, sweep
from dsdistill.cli.options import Verb

VERBS: dict[str, Verb] = {**runs.VERBS, **experts.VERBS, **sweep.VERBS, **catalog.VERBS, **sets.VERBS}
