"""What a study found: accuracy against budget, with intervals over synthesis seeds."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dsdistill.engine.workspace import differences
from dsdistill.errors import BadArtifact
from dsdistill.evaluation import Score
from dsdistill.evaluation.result import HARD, cells, table
from dsdistill.studies.folder import RESULTS
from dsdistill.studies.ledger import Ledger, Line

NOTE = "± is the 95 % t-interval over synthesis seeds; a seed counts once, with the mean over its networks"
ONE_SEED = "one synthesis seed: no interval, because the spread of its networks says nothing of other seeds"


@dataclass(frozen=True)
class Point:
    """A method at one budget. All figures are fractions.

    ``setting`` says on what and how everything was scored. ``networks`` maps a synthesis seed to the accuracies of its
    networks (of all evaluation seeds, where there are several); ``accuracy``, ``random`` and ``gain`` are over seeds,
    each of which gives the mean of its networks. The gain is over random real images and paired; it and ``random`` are
    None where those were not scored. ``hard`` is the same training on classes alone, None where networks learned those
    anyway. ``bytes`` is the stored form, labels included; ``random_bytes`` that of as many plain real images.
    """

    setting: str
    method: str
    ipc: int
    bytes: int
    random_bytes: int
    networks: Mapping[int, tuple[float, ...]]
    accuracy: Score
    random: Score | None
    gain: Score | None
    hard: Score | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        scores = {"accuracy": self.accuracy, "random": self.random, "gain": self.gain, "hard": self.hard}
        return {
            "setting": self.setting,
            "method": self.method,
            "ipc": self.ipc,
            "bytes": self.bytes,
            "random_bytes": self.random_bytes,
            "networks": {str(seed): list(values) for seed, values in self.networks.items()},
            **{name: None if score is None else score.to_json() for name, score in scores.items()},
        }


class Whole(NamedTuple):
    """Accuracies of networks trained on the whole training set for so many epochs."""

    accuracy: Score
    epochs: int


@dataclass(frozen=True)
class StudyResult:
    """Cells of a study, each with its last line in ``results.jsonl``."""

    rows: tuple[Line, ...]

    @property
    def done(self) -> list[Line]:
        """Lines of finished cells."""
        return [row for row in self.rows if row["status"] == "done"]

    @property
    def failed(self) -> list[Line]:
        """Lines of failed cells."""
        return [row for row in self.rows if row["status"] != "done"]

    @cached_property
    def points(self) -> list[Point]:
        """Methods by budget, in the order in which methods first appear; budgets ascending."""
        methods, settings = _methods(self.done), _settings(self.done)
        groups: dict[tuple[str, str, int], list[Line]] = {}
        for row, method, setting in zip(self.done, methods, settings, strict=True):
            if not row["whole"]:
                groups.setdefault((setting, method, row["ipc"]), []).append(row)
        order = list(dict.fromkeys(zip(settings, methods, strict=True)))
        return [
            _point(*key, groups[key]) for key in sorted(groups, key=lambda key: (order.index((key[0], key[1])), key[2]))
        ]

    @property
    def whole(self) -> dict[str, Whole]:
        """Scores of the whole training set by setting; empty where they were not asked for."""
        return {
            setting: Whole(
                Score(tuple(row["baselines"]["whole"])),
                row["evaluation"]["whole_epochs"] or row["evaluation"]["protocol"]["epochs"],
            )
            for row, setting in zip(self.done, _settings(self.done), strict=True)
            if row["whole"]
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain containers."""
        return {
            "format": "dsdistill.study",
            "schema_version": 1,
            "note": NOTE,
            "points": [point.to_json() for point in self.points],
            "whole": {
                setting: {"epochs": whole.epochs, **whole.accuracy.to_json()} for setting, whole in self.whole.items()
            },
            "rows": list(self.rows),
        }

    def __str__(self) -> str:
        parts = [_section(setting, points, self.whole.get(setting)) for setting, points in by_setting(self.points)]
        if self.failed:
            parts.append("\n".join([f"{len(self.failed)} cells failed:", *map(_failure, self.failed)]))
        return "\n\n".join(parts) or "no cell is finished"


def report(out: str | Path) -> StudyResult:
    """All that a study folder holds, from its ``results.jsonl`` alone; also while the study is still at work.

    Raises:
        BadArtifact: there is no such file, or it is damaged.
    """
    path = Path(out) / RESULTS
    if not path.is_file():
        raise BadArtifact(path, "no such file: the folder holds no study, or none of its cells has ended yet")
    return StudyResult(tuple(Ledger(path).latest().values()))


def by_setting(points: Iterable[Point]) -> list[tuple[str, list[Point]]]:
    """Points of equal data and scoring together."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    return list(groups.items())


def _point(setting: str, method: str, ipc: int, rows: Sequence[Line]) -> Point:
    by_seed: dict[int, dict[int, Line]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by_seed.setdefault(row["seed"], {})[row["evaluation"]["seed"]] = row

    def collect(values: Callable[[Line], Sequence[float] | None]) -> list[tuple[float, ...]]:
        """Of each seed, the values of all its networks."""
        return [tuple(value for row in own.values() for value in values(row) or ()) for own in by_seed.values()]

    networks, randoms = collect(lambda row: row["accuracies"]), collect(lambda row: row["baselines"].get("random"))
    gains = collect(lambda row: row["gain"])
    hard = collect(lambda row: row["baselines"].get(f"synthetic{HARD}"))
    return Point(
        setting=setting,
        method=method,
        ipc=ipc,
        bytes=max(row["bytes"]["total"] for row in rows),
        random_bytes=max(row["bytes"]["random"] for row in rows),
        networks=dict(zip(by_seed, networks, strict=True)),
        accuracy=_over_seeds(networks),
        random=_over_seeds(randoms) if all(randoms) else None,
        gain=_over_seeds(gains) if all(gains) else None,
        hard=_over_seeds(hard) if all(hard) else None,
    )


def _over_seeds(values: Sequence[Sequence[float]]) -> Score:
    """One value for each seed: the mean over its networks, which share a set and are no independent samples of it."""
    return Score(tuple(Score(tuple(networks)).mean for networks in values))


def _settings(rows: Sequence[Line]) -> list[str]:
    """Data and scoring in words."""
    names, values = [], []
    for row in rows:
        data, evaluation = row["data"], row["evaluation"]
        protocol = evaluation["protocol"]
        network = {name: value for name, value in protocol["network"].items() if value is not None and name != "type"}
        words = [
            f"{data['name']} ({data['fingerprint'][:8]})",
            f"protocol {row['protocol']}",
            f"{protocol['epochs']} epochs",
            " ".join([network.pop("name"), *(f"{name}={value}" for name, value in network.items())]),
            f"{evaluation['repeats']} networks per seed",
        ]
        names.append(", ".join(words))
        values.append({"data": data, "protocol": protocol, "teachers": evaluation.get("teachers")})
    return _distinguished(names, values, separator=", ")


def _methods(rows: Sequence[Line]) -> list[str]:
    """Names of methods, with the settings (other than the budget) in which two of one name differ."""
    return _distinguished([row["method"] for row in rows], [_without_budget(row["settings"]) for row in rows])


def _without_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method, and of the one it wraps, but for ``ipc``."""
    base = settings.get("base")
    inner = {"base": _without_budget(base)} if isinstance(base, Mapping) else {}
    return {**settings, **inner, "ipc": None}


def _distinguished(names: Sequence[str], values: Sequence[Mapping[str, Any]], separator: str = " ") -> list[str]:
    """Names, with those values added in which two of one name differ."""
    first: dict[str, Mapping[str, Any]] = {}
    varying: dict[str, set[str]] = {}
    for name, own in zip(names, values, strict=True):
        changes = differences(first.setdefault(name, own), own)
        varying.setdefault(name, set()).update(change.partition(": ")[0] for change in changes)
    return [
        separator.join([name, *(f"{place}={_at(own, place)}" for place in sorted(varying[name]))])
        for name, own in zip(names, values, strict=True)
    ]


def _at(values: Mapping[str, Any], place: str) -> str:
    found: Any = values
    for name in place.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else json.dumps(found)


def _section(setting: str, points: Sequence[Point], whole: Whole | None) -> str:
    taught = any(point.hard for point in points)
    hard = ("hard %", "95 %") if taught else ()
    rows = [("method", "ipc", "bytes", "accuracy %", "95 %", *hard, "random %", "gain", "95 %", "seeds x networks")]
    for point in points:
        random = cells(point.random)[0] if point.random else "-"
        gain = (f"{100 * point.gain.mean:+.2f}", cells(point.gain)[1]) if point.gain else ("-", "-")
        n = sorted({len(values) for values in point.networks.values()})
        networks = f"{point.accuracy.n} x {'/'.join(map(str, n))}"
        hard = () if not taught else cells(point.hard) if point.hard else ("-", "-")
        figures = (str(point.ipc), f"{point.bytes:,}", *cells(point.accuracy), *hard, random, *gain, networks)
        rows.append((point.method, *figures))
    lines = [setting, *table(rows)]
    if whole is not None:
        lines.append(f"whole training set, {whole.epochs} epochs: {whole.accuracy}, over networks of one seed")
    several = any(point.accuracy.n > 1 for point in points)
    single = any(point.accuracy.n == 1 for point in points)
    return "\n".join([*lines, *([NOTE] if several else []), *([ONE_SEED] if single else [])])


def _failure(row: Line) -> str:
    return (
        f"  {row['key'][:12]}  {row['method']} ipc {row['ipc']} seed {row['seed']}: {row['error']}: {row['message']} "
        f"({row['traceback']})"
    )
