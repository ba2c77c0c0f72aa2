"""The verb on labels: have teachers say what every view of a set shows, and keep it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import NO_MIX, Verb, path_arguments, run_arguments, say
from dsdistill.errors import InvalidSetting


def _relabel_arguments(parser: ArgumentParser) -> None:
    from dsdistill.evaluation import list_protocols
    from dsdistill.relabelling import FerKD

    path_arguments(parser)
    parser.add_argument(
        "--teachers", type=Path, nargs="+", required=True, help="Folder of a teacher or of folders of such; or several."
    )
    parser.add_argument(
        "--protocol",
        type=str,
        default="cvdd",
        help=f"How networks will be trained on the labels: {', '.join(list_protocols())}.",
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs instead of the protocol's.")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images of a mini-batch instead of the protocol's."
    )
    parser.add_argument("--no_mix", action="store_true", help=NO_MIX)
    parser.add_argument(
        "--kind",
        type=Literal["replayed", "static", "distances"],
        default="replayed",
        help="replayed: logits of every view; static: of the clean images, once; distances: two numbers a view.",
    )
    parser.add_argument(
        "--codec",
        type=Literal["float16", "float32", "uint8", "topk"],
        default="float16",
        help="How logits are stored; topk: the largest probabilities alone.",
    )
    parser.add_argument("--top", type=int | None, default=None, help="Of topk: how many (10).")
    parser.add_argument(
        "--rest",
        type=Literal["smooth", "renorm"] | None,
        default=None,
        help="Of topk: what other classes get, evenly what is missing to 1 (smooth), or nothing (renorm).",
    )
    parser.add_argument(
        "--temperature",
        type=float | Literal["equal"] | None,
        default=None,
        help="Teachers vote by softmax(performance / temperature), or equal: all alike; by default as the protocol "
        "says (cvdd: 10), and all alike for static labels.",
    )
    parser.add_argument(
        "--calibration",
        type=FerKD | None,
        default=None,
        help="FerKD: leave views out, or give them their class; settings as --calibration.low, ...",
    )
    parser.add_argument(
        "--records",
        type=Literal["stored", "drawn"] | None,
        default=None,
        help="What the views are: stored, or drawn anew from the seed; by default drawn for distances alone.",
    )
    run_arguments(parser)
    parser.add_argument(
        "--chunk", type=int | None, default=None, help="Images per forward pass; lower it when memory runs out."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder for the labels; the same command again continues."
    )
    parser.add_argument("--dry-run", action="store_true", help="Write nothing, print what the labels will cost.")


def _relabel(config: Namespace) -> Any:
    import dsdistill as dd
    from dsdistill.core.device import resolve_device
    from dsdistill.evaluation import get_protocol
    from dsdistill.experts import Committee
    from dsdistill.relabelling import estimate_labels, relabel

    device = resolve_device(config.device)
    asked = {name: config[name] for name in ("epochs", "batch_size") if config[name] is not None}
    if config.no_mix:
        asked["mix"] = None
    if config.kind == "static" and asked:
        option = "no_mix" if "mix" in asked else next(iter(asked))
        raise InvalidSetting("--kind", config.kind, f"without --{option}: static labels are made once")
    if config.temperature == "equal":
        asked["vote_temperature"] = None
    recipe = None if config.kind == "static" else replace(get_protocol(config.protocol), **asked)
    if recipe is not None and recipe.distillation is None:
        allowed = (
            "one whose networks learn from teachers (cvdd, sre2l, rethinking_soft, ...); these learn classes alone"
        )
        raise InvalidSetting("--protocol", config.protocol, allowed)
    options = {
        **{name: config[name] for name in ("kind", "calibration", "records", "seed")},
        "temperature": None if config.temperature == "equal" else config.temperature,
        "codec": _codec(config),
    }
    synthetic, committee = dd.SyntheticDataset.load(config.path), Committee.load(config.teachers, device=device)
    placed = {"device": device, "chunk": config.chunk, "out": config.out}
    cost = estimate_labels(synthetic, committee, recipe, **options, **placed)
    say(config, str(cost))
    if config.dry_run:
        return cost.to_json()
    labels = relabel(synthetic, committee, recipe, **options, **placed)
    times = labels.nbytes / max(1, synthetic.nbytes.images)
    say(config, f"{labels!r}\n{times:.1f} times the bytes of the images; saved in {config.out}")
    return {"path": str(config.out), "bytes": labels.nbytes, **labels.heading.to_json()}


def _codec(config: Namespace) -> Any:
    from dsdistill.relabelling import TopK

    chosen = {name: value for name, value in (("k", config.top), ("rest", config.rest)) if value is not None}
    if config.codec == "topk":
        return TopK(**chosen)
    if chosen:
        raise InvalidSetting("--codec", config.codec, "topk, if --top or --rest are given")
    return config.codec


VERBS = {
    "relabel": Verb(
        "Have teachers label every view of a set that networks will see, and store views and labels.",
        "  dsdistill relabel runs/cvdd --teachers teachers/cifar10 --protocol cvdd --out labels --dry-run\n"
        "  dsdistill relabel runs/cvdd --teachers teachers/cifar10 --protocol cvdd --temperature equal --out labels\n"
        "  dsdistill relabel runs/sre2l --teachers teachers/cifar10 --protocol sre2l --no_mix --calibration.low 0.05 "
        "--out labels\n"
        "  dsdistill relabel runs/infer --teachers teachers/cifar100 --kind static --out labels\n"
        "  dsdistill evaluate runs/cvdd --data cifar10 --protocol cvdd --labels labels --teachers teachers/cifar10",
        _relabel_arguments,
        _relabel,
    )
}
