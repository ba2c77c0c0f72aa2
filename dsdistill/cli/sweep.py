"""The verb that distils and scores a grid: sweep."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import Verb, data_arguments, say, split
from dsdistill.errors import BadData, DistillError, InvalidSetting, UnknownName


class StudyIncomplete(DistillError):
    """Some cells of a sweep failed; the others are done. Exit code 1. Attribute: ``failed``, their lines."""

    def __init__(self, failed: Sequence[Mapping[str, Any]], total: int, out: Path) -> None:
        self.failed = tuple(failed)
        listing = "".join(
            f"\n  {row['method']} ipc {row['ipc']} seed {row['seed']}: {row['error']}: {row['message']} "
            f"({out / row['traceback']})"
            for row in failed
        )
        super().__init__(
            f"{len(failed)} of {total} cells failed:{listing}\nThe others are done; the same command tries these again."
        )


def arguments(parser: ArgumentParser) -> None:
    """What sweep takes."""
    from dsdistill.evaluation import list_protocols
    from dsdistill.networks import NetworkSpec

    data_arguments(parser)
    parser.add_argument("--methods", type=str, required=True, help="Names with commas between: DM,RandomReal.")
    parser.add_argument(
        "--set",
        type=str,
        action="extend",
        nargs="+",
        default=[],
        help="A setting: iterations=500 for every method that has it, DM.lr_images=0.5 for one. May be repeated.",
    )
    parser.add_argument("--ipc", type=int | str, default="1,10,50", help="Budgets: stored images per class, e.g. 1,10.")
    parser.add_argument("--seeds", type=int | str, default=3, help="How many, counted from 0, or which: 0,5,7.")
    parser.add_argument(
        "--protocol", type=str, default="dsa", help=f"How networks are trained: {', '.join(list_protocols())}."
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs instead of the protocol's.")
    parser.add_argument(
        "--network",
        type=NetworkSpec | None,
        default=None,
        help="Network of the evaluation instead of the protocol's: its name; --network.width, ...",
    )
    parser.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=None,
        help="Folder of teachers, or several, asked under protocols that learn from some (cvdd, rethinking_soft, ...).",
    )
    parser.add_argument("--repeats", type=int, default=5, help="Fresh networks per seed and row.")
    parser.add_argument(
        "--baselines",
        type=str,
        nargs="*",
        default=["random"],
        help="Beside the sets: random, in every cell; whole, once; or none.",
    )
    parser.add_argument("--whole_epochs", type=int | None, default=None, help="Epochs of the whole-training-set row.")
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="Processes, 1 for none but this; by default one per GPU, else one per core, at most 8.",
    )
    parser.add_argument(
        "--devices", type=str | None, default=None, help="Devices with commas between, dealt out to the processes."
    )
    parser.add_argument(
        "--retry_failed", type=bool, default=True, help="Try cells that failed in an earlier call again."
    )
    parser.add_argument("--checkpoint_every", type=int, default=100, help="Steps between checkpoints.")
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder of the study; the same command again continues it."
    )


def run(config: Namespace) -> Any:
    """Run the grid, draw the plot, print the table.

    Raises:
        StudyIncomplete: some cells failed. Other errors as `dsdistill.studies.grid`.
    """
    from dsdistill import studies
    from dsdistill.evaluation import get_protocol

    protocol = get_protocol(config.protocol)
    with _mends():
        result = studies.grid(
            config.data,
            methods(config.methods, config.set),
            out=config.out,
            ipc=_integers("ipc", str(config.ipc)),
            seeds=config.seeds if isinstance(config.seeds, int) else _integers("seeds", config.seeds),
            protocol=protocol if config.network is None else replace(protocol, network=config.network),
            epochs=config.epochs,
            repeats=config.repeats,
            baselines=[name for name in config.baselines if name != "none"],
            whole_epochs=config.whole_epochs,
            teachers=config.teachers,
            workers=config.workers,
            devices=config.devices.split(",") if config.devices else None,
            load=vars(config.load),
            retry_failed=config.retry_failed,
            checkpoint_every=config.checkpoint_every,
        )
    say(config, str(result))
    if result.points:
        png, svg = studies.plot(result, config.out)
        say(config, f"\nplot: {png}, {svg.name}; every cell: {config.out / 'results.jsonl'}")
    if result.failed:
        raise StudyIncomplete(result.failed, len(result.rows), config.out)
    return result.to_json()


@contextmanager
def _mends() -> Iterator[None]:
    """A setting that an error names, as it is set here."""
    try:
        yield
    except BadData as error:
        if "on_small_class" not in str(error):
            raise
        raise BadData(f"{error}; here: --set on_small_class=cap, or another --ipc") from error


def methods(names: str, assignments: Sequence[str]) -> list[Any]:
    """Methods by name, with settings such as "iterations=500", "DM.lr_images=0.5" or "network.width=64".

    A setting without a method goes to every method that has it. Values are JSON; what is no JSON is text.

    Raises:
        UnknownName: no such method or setting, with the nearest one.
        InvalidSetting: a value that does not fit, or an assignment that is none.
    """
    from dsdistill.core.config import describe
    from dsdistill.methods import create_method, get_method

    # "FYI+DM": settings are those of the method that is wrapped.
    chains = [[get_method(part) for part in name.split("+")] for name in split(names)]
    classes = {"+".join(cls.__name__ for cls in chain): chain[-1] for chain in chains}
    fields = {name: {field.name: field for field in describe(cls)} for name, cls in classes.items()}
    settings: dict[str, dict[str, Any]] = {name: {} for name in classes}
    for assignment in assignments:
        place, equals, text = assignment.partition("=")
        path = place.strip().split(".")
        if not equals or not all(path):
            raise InvalidSetting("--set", assignment, "SETTING=VALUE or METHOD.SETTING=VALUE")
        target, path = _target(path, fields)
        for name in target:
            _assign(settings[name], classes[name], path, _value(text))
    return [create_method(name, **_revived(cls, settings[name])) for name, cls in classes.items()]


def _revived(cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings with the objects that they describe."""
    from dsdistill.core.config import from_dict

    made = from_dict(cls, settings)
    return {name: getattr(made, name) for name in settings}


def _target(path: list[str], fields: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Which methods an assignment is for, and its place within them."""
    by_name = {name.lower(): name for name in fields}
    named = by_name.get(path[0].lower()) if len(path) > 1 else None
    chosen, path = ([named], path[1:]) if named else (list(fields), path)
    if path[0] == "ipc":
        raise InvalidSetting("--set", ".".join(path), "budgets are given with --ipc")
    having = [name for name in chosen if path[0] in fields[name]]
    if not having:
        known = {setting for name in chosen for setting in fields[name]} | ({*fields} if named is None else set())
        raise UnknownName(f"setting of {' and '.join(chosen)}", path[0], sorted(known - {"ipc"}))
    return having, path


def _assign(settings: dict[str, Any], cls: type, path: Sequence[str], value: Any) -> None:
    """Set a value; a place inside a setting changes that of its default, or of its class where that is null."""
    from dsdistill.core.config import TYPE_KEY, default_of, inner_classes, to_dict

    inner, kind = settings, cls
    for depth, name in enumerate(path[:-1]):
        known = inner_classes(kind, name) if name in {field.name for field in fields(kind)} else {}
        found = inner.get(name)
        if known and name not in inner and (default := default_of(kind, name)) is not MISSING:
            found = to_dict(default)
        if len(known) == 1 and (found is None or (isinstance(found, dict) and TYPE_KEY not in found)):
            found = {TYPE_KEY: next(iter(known)), **(found or {})}
        if not isinstance(found, dict) or found.get(TYPE_KEY) not in known:
            place = ".".join(path[: depth + 1])
            among = f"; choose one as {place}='{{\"type\": ...}}' of {', '.join(known)}" if len(known) > 1 else ""
            raise InvalidSetting("--set", ".".join(path), f"{place} has no settings of its own{among}")
        inner[name], inner, kind = found, found, known[found[TYPE_KEY]]
    inner[path[-1]] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in split(text)]
    except ValueError:
        raise InvalidSetting(f"--{name}", text, "integers with commas between, such as 1,10,50") from None


VERBS = {
    "sweep": Verb(
        "Distil and score methods at several budgets under several seeds, killed and continued at will.",
        "  dsdistill sweep --data digits --methods DM,RandomReal --ipc 1,10 --seeds 3 --set iterations=300 "
        "--epochs 100 --out runs/study\n"
        "  dsdistill sweep --data cifar10 --methods DM --ipc 1,10,50 --set DM.lr_images=0.5 --devices cuda:0,cuda:1 "
        "--out runs/cifar10\n"
        "  dsdistill sweep --data cifar10 --methods CVDD,SRe2L,RandomReal --set teachers.folder=teachers --ipc 1,10 "
        "--protocol cvdd --teachers teachers --out runs/taught",
        arguments,
        run,
    )
}
