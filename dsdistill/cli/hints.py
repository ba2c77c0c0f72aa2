"""What to type after `dsdistill synthesize`: commands that score the set under a protocol that suits its method."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dsdistill.cli.options import LoadOptions
from dsdistill.errors import InvalidSetting

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset


def next_commands(config: Namespace, synthetic: "SyntheticDataset", source: Any) -> list[str]:
    """Commands that label a set, where its method has teachers, and score it."""
    teachers = getattr(getattr(config.method, "base", config.method), "teachers", None)
    if teachers is None:
        return [_evaluate(config, _protocol_of(synthetic))]
    protocol, labels = _protocol_of(synthetic, config.method), f"{config.out}-labels"
    asked, vote = _asked(config, teachers, source)
    if not _recordable(protocol[-1]):
        return [_evaluate(config, [*protocol, *asked, *vote])]
    kind = {"ufc_static": ["--kind", "static"], "rethinking_soft": ["--kind", "distances", *protocol]}
    how = kind.get(protocol[-1], protocol)
    relabel = ["dsdistill", "relabel", str(config.out), *asked, *how, *vote, "--out", labels]
    return [shlex.join(relabel), _evaluate(config, [*protocol, "--labels", labels, *asked])]


def _evaluate(config: Namespace, options: Sequence[str]) -> str:
    loading = [
        f"--load.{name}={list(value) if isinstance(value, tuple) else value}"
        for name, value in vars(config.load).items()
        if value != getattr(LoadOptions, name)
    ]
    return shlex.join(["dsdistill", "evaluate", str(config.out), "--data", config.data, *loading, *options])


def _protocol_of(synthetic: "SyntheticDataset", method: Any = None) -> list[str]:
    """The option for the method's protocol, or one that trains with the step size that a set carries; none for dsa."""
    from dsdistill.exchange.arrays import LEARNED_LR
    from dsdistill.labels import SoftLabels

    if method is not None:
        own = getattr(method, "base", method).protocol
        small = own == "rded" and max(synthetic.shape[1:]) <= 64
        return ["--protocol", "rded_small" if small else own]
    if LEARNED_LR not in synthetic.learned:
        return []
    return ["--protocol", "datm" if isinstance(synthetic.labels, SoftLabels) else "mtt"]


def _asked(config: Namespace, teachers: Any, source: Any) -> tuple[list[str], list[str]]:
    """Options for the teachers, and for an equal vote of those whose priors are not known."""
    from dsdistill.data.cache import cache_folder
    from dsdistill.experts.committee import recorded_performances

    places = teachers.folders(source, cache_folder() if config.store is None else config.store)
    performances = [one for place in places for one in recorded_performances(place)]
    known = len(performances) == 1 or None not in performances
    return ["--teachers", *map(str, places)], [] if known else ["--temperature", "equal"]


def _recordable(protocol: str) -> bool:
    from dsdistill.protocols import get_protocol
    from dsdistill.relabelling.record import require_recordable

    try:
        require_recordable(get_protocol(protocol))
    except InvalidSetting:
        return False
    return True
