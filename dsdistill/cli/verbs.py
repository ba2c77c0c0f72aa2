"""All verbs of the command line, in the order of the help."""

from dsdistill.cli import catalog, experts, relabel, runs, sets, sweep, teachers
from dsdistill.cli.options import Verb

VERBS: dict[str, Verb] = {
    name: verb
    for module in (runs, experts, teachers, relabel, sweep, catalog, sets)
    for name, verb in module.VERBS.items()
}
