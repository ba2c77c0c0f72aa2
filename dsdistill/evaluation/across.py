"""One set, several networks: does what was distilled with one architecture train another?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsdistill.data import ImageSource
from dsdistill.errors import InvalidSetting
from dsdistill.evaluation.result import TITLES, EvaluationResult, cells, table
from dsdistill.evaluation.score import evaluate
from dsdistill.networks import NetworkSpec
from dsdistill.protocols import EvaluationProtocol, get_protocol
from dsdistill.synthetic import SyntheticDataset


@dataclass(frozen=True)
class CrossEvaluation:
    """Results by network, in the order asked for: ``results[spec]``."""

    results: Mapping[NetworkSpec, EvaluationResult]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain containers."""
        return {
            "format": "dsdistill.cross_evaluation",
            "schema_version": 1,
            "results": [result.to_json() for result in self.results.values()],
        }

    def __str__(self) -> str:
        rows = list(next(iter(self.results.values())).scores)
        head = ["network"]
        for row in rows:
            head += [f"{TITLES[row]} %", "95 %"]
        lines = [head]
        for spec, result in self.results.items():
            line = [describe(spec)]
            for row in rows:
                line += cells(result.scores[row])
            lines.append(line)
        first = next(iter(self.results.values()))
        return "\n".join([*table(lines), f"protocol {first.protocol.title}, n={first.accuracy.n} for each cell"])


def evaluate_across(
    synthetic: SyntheticDataset,
    source: ImageSource,
    networks: Sequence[str | NetworkSpec],
    *,
    protocol: str | EvaluationProtocol = "dsa",
    **options: Any,
) -> CrossEvaluation:
    """`evaluate` under one protocol with each of several networks: the cross-architecture table.

    Args:
        synthetic: the set to score.
        source: the real data it was made from.
        networks: names or specs, each once.
        protocol: name or instance; its own network is replaced by each of ``networks``.
        options: everything else that `evaluate` takes.

    Raises:
        InvalidSetting: no network, one twice, or one that does not fit the images; before any training.
        Other errors as `evaluate`.
    """
    specs = [NetworkSpec(network) if isinstance(network, str) else network for network in networks]
    if not specs or len(set(specs)) < len(specs):
        raise InvalidSetting("networks", [describe(spec) for spec in specs], "at least one network, each once")
    for spec in specs:
        spec.require((), source.shape, source.num_classes)
    base = get_protocol(protocol) if isinstance(protocol, str) else protocol
    return CrossEvaluation(
        {spec: evaluate(synthetic, source, protocol=replace(base, network=spec), **options) for spec in specs}
    )


def describe(spec: NetworkSpec) -> str:
    """A network in a few words: its name, and the settings that are not its defaults."""
    settings = [
        f"{name}={getattr(spec, name)}"
        for name in ("width", "depth", "norm", "activation", "pooling")
        if getattr(spec, name) is not None
    ]
    return " ".join([spec.name, *settings])
