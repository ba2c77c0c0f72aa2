"""Verbs that compute: synthesize, evaluate, quickstart."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.experts import STORE_HELP
from dsdistill.cli.hints import next_commands
from dsdistill.cli.options import (
    NO_MIX,
    Verb,
    data_arguments,
    load_source,
    run_arguments,
    say,
    split,
    summary,
)
from dsdistill.cli.presets import preset_argument
from dsdistill.core import storage
from dsdistill.errors import DistillError, InvalidSetting, OutputConflict, UnknownName

if TYPE_CHECKING:
    from dsdistill.networks import NetworkSpec


def _synthesize_arguments(parser: ArgumentParser) -> None:
    from dsdistill.engine import Synthesizer
    from dsdistill.methods import get_method, list_methods

    for name in list_methods():  # a class must be imported for the parser to know it by name
        try:
            get_method(name)
        except DistillError as error:  # of another package: no reason to fail those who do not use it
            logging.getLogger("dsdistill").warning("%s", error)
    data_arguments(parser)
    parser.add_subclass_arguments(
        Synthesizer,
        "method",
        required=True,
        help="Method by name, its settings as --method.SETTING. See: dsdistill methods; dsdistill show NAME.",
    )
    preset_argument(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="Output folder; the same command again continues an interrupted run."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Make the first steps only, write nothing, print what the run will cost."
    )
    run_arguments(parser)
    parser.add_argument("--store", type=Path | None, default=None, help=STORE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="Replace a run that the output folder already holds.")
    parser.add_argument("--checkpoint_every", type=int, default=100, help="Steps between checkpoints.")
    parser.add_argument(
        "--chunk", type=int | None, default=None, help="Images per forward pass; lower it when memory runs out."
    )


def _synthesize(config: Namespace) -> Any:
    import dsdistill as dd

    source = load_source(config)
    if config.dry_run:
        placed = {name: config[name] for name in ("device", "out", "chunk", "store")}
        with _quiet():
            cost = dd.estimate(config.method, source, seed=config.seed, **placed)
        say(config, str(cost))
        return cost.to_json()
    synthetic = dd.synthesize(
        config.method,
        source,
        seed=config.seed,
        device=config.device,
        out=config.out,
        overwrite=config.overwrite,
        checkpoint_every=config.checkpoint_every,
        chunk=config.chunk,
        store=config.store,
    )
    commands = next_commands(config, synthetic, source)
    if len(commands) == 1:
        told = f"score it with: {commands[0]}"
    else:
        told = "\n  ".join(["have its teachers label it, and score it on what they say:", *commands])
    say(config, f"{synthetic!r}\nsaved in {config.out}; {told}")
    return summary(config.out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings only: a rehearsal begins the same run several times, and would say so each time."""
    logger = logging.getLogger("dsdistill")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _evaluate_arguments(parser: ArgumentParser) -> None:
    from dsdistill.evaluation import list_protocols
    from dsdistill.networks import NetworkSpec

    parser.add_argument("path", type=Path, help="Folder of a synthetic set.")
    data_arguments(parser)
    parser.add_argument(
        "--protocol", type=str, default="dsa", help=f"How networks are trained: {', '.join(list_protocols())}."
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs instead of the protocol's.")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images of a mini-batch instead of the protocol's."
    )
    parser.add_argument(
        "--network",
        type=NetworkSpec | None,
        default=None,
        help="Network instead of the protocol's: its name; --network.width, ...",
    )
    parser.add_argument(
        "--networks",
        type=str,
        nargs="*",
        default=None,
        help="Several networks by name, one after the other: the cross-architecture table.",
    )
    parser.add_argument(
        "--selection",
        type=Literal["last", "validation"] | None,
        default=None,
        help="Which network is tested, instead of the protocol's choice: the one after the last epoch, or the best on "
        "real training images held out.",
    )
    parser.add_argument("--no_mix", action="store_true", help=NO_MIX)
    parser.add_argument(
        "--temperature",
        type=float | Literal["equal"] | None,
        default=None,
        help="Of protocols with teachers, instead of the protocol's: they vote by softmax(prior / temperature), or "
        "equal: all alike. With --labels those decide.",
    )
    parser.add_argument("--repeats", type=int, default=5, help="Fresh networks per row of the table.")
    parser.add_argument("--together", type=int, default=1, help="Networks trained as one stacked computation.")
    parser.add_argument("--per_class", action="store_true", help="Show the accuracy of each class too.")
    parser.add_argument(
        "--baselines", type=str, nargs="*", default=["random"], help="Rows beside the set: random, whole, or none."
    )
    parser.add_argument(
        "--labels", type=Path | None, default=None, help="Folder of teachers' labels of the set (dsdistill relabel)."
    )
    parser.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=None,
        help="Folder of teachers, or several; of protocols that learn from some, asked where there are no --labels.",
    )
    parser.add_argument("--whole_epochs", type=int | None, default=None, help="Epochs of the whole-training-set row.")
    run_arguments(parser)
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for the result.")
    parser.add_argument("--overwrite", action="store_true", help="Replace that file if it exists.")


def _evaluate(config: Namespace) -> Any:
    import dsdistill as dd

    networks, options = _evaluation(config)
    synthetic = dd.SyntheticDataset.load(config.path)
    options |= _teaching(config)
    if config.out:
        _require_target(config.out, config.overwrite)
    if networks is not None:
        across = dd.evaluation.evaluate_across(synthetic, load_source(config), networks, **options)
        results, shown, content = list(across.results.values()), str(across), across.to_json()
    else:
        result = dd.evaluate(synthetic, load_source(config), **options)
        results, shown, content = [result], str(result), result.to_json()
    if config.out:
        storage.write_json(config.out, content)
        say(config, f"written to {config.out}")
    say(config, shown)
    if config.per_class:
        for result in results:
            say(config, f"\naccuracy of each class, {result.protocol.network.name}\n{result.class_table()}")
    return content


def _evaluation(config: Namespace) -> "tuple[list[NetworkSpec] | None, dict[str, Any]]":
    """Networks of the cross-architecture table, if any, and options of `evaluate`, checked before any image is read."""
    from dsdistill.core.config import whole_number
    from dsdistill.evaluation import get_protocol
    from dsdistill.evaluation.score import BASELINES
    from dsdistill.networks import NetworkSpec

    chosen = {name: getattr(config, name) for name in ("network", "epochs", "batch_size", "selection")}
    changes = {name: value for name, value in chosen.items() if value is not None}
    if config.no_mix:
        changes["mix"] = None
    if config.temperature is not None:
        if config.labels is not None:
            raise InvalidSetting("--temperature", config.temperature, "without --labels, whose teachers have voted")
        changes["vote_temperature"] = None if config.temperature == "equal" else config.temperature
    protocol = replace(get_protocol(config.protocol), **changes)
    networks = None
    if config.networks is not None:
        networks = [NetworkSpec(name) for name in split(config.networks)]
        if not networks:
            raise InvalidSetting("--networks", config.networks, "name at least one network")
        if config.network is not None:
            raise InvalidSetting("--networks", config.networks, "either --network or --networks, not both")
    baselines = [name for name in split(config.baselines) if name != "none"]
    for name in baselines:
        if name not in BASELINES:
            raise UnknownName("baseline", name, [*BASELINES, "none"])
    counts = {
        name: None if config[name] is None else whole_number(f"--{name}", config[name], 1)
        for name in ("repeats", "together", "whole_epochs")
    }
    options = {"protocol": protocol, "baselines": baselines, "seed": config.seed, "device": config.device, **counts}
    return networks, options


def _teaching(config: Namespace) -> dict[str, Any]:
    """Labels and teachers, for `evaluate`."""
    from dsdistill.core.device import resolve_device
    from dsdistill.experts import Committee
    from dsdistill.relabelling import LabelSet

    labels = None if config.labels is None else LabelSet.load(config.labels)
    teachers = None
    if config.teachers is not None:
        teachers = Committee.load(config.teachers, device=resolve_device(config.device))
    return {"labels": labels, "teachers": teachers}


def _require_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that could not be written after hours of training."""
    if os.path.isdir(path):
        raise OutputConflict(path, "is a folder; name a JSON file")
    if os.path.exists(path) and not overwrite:
        raise OutputConflict(path, "exists already; choose another file, or --overwrite it")
    storage.ensure_writable(path.parent)


def _quickstart_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="Output folder.")
    run_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier quickstart in that folder.")


def _quickstart(config: Namespace) -> Any:
    from dsdistill.cli.quickstart import quickstart

    result = quickstart(config.out, seed=config.seed, device=config.device, overwrite=config.overwrite)
    say(config, f"{result}\n\nset, card and grid.png: {config.out}\nresults: {config.out / 'results.json'}")
    return result.to_json()


VERBS = {
    "quickstart": Verb(
        "Distil scikit-learn's digits and score the result, in about a minute.",
        "  dsdistill quickstart --out digits-dm",
        _quickstart_arguments,
        _quickstart,
    ),
    "synthesize": Verb(
        "Distil real images into a few synthetic ones per class.",
        "  dsdistill synthesize --data digits --method DM --method.ipc 10 --method.iterations 500 --out runs/dm\n"
        "  dsdistill synthesize --data cifar10 --method DM --preset cifar10/ipc10 --method.lr_images 5 --out runs/dm\n"
        "  dsdistill synthesize --data my/images --load.image_size 32 --method DM --method.ipc 1 --out runs/mine\n"
        "  dsdistill synthesize --method DM --data digits --out runs/dm --print_config > run.yaml\n"
        "  dsdistill synthesize --config run.yaml --seed 1 --out runs/dm-seed1",
        _synthesize_arguments,
        _synthesize,
    ),
    "evaluate": Verb(
        "Score a synthetic set by training fresh networks on it.",
        "  dsdistill evaluate runs/dm --data digits --protocol dsa --epochs 300 --repeats 5\n"
        "  dsdistill evaluate runs/dm --data digits --baselines random whole --out score.json\n"
        "  dsdistill evaluate runs/sre2l --data cifar10 --protocol cvdd --labels labels --teachers teachers/cifar10",
        _evaluate_arguments,
        _evaluate,
    ),
}
