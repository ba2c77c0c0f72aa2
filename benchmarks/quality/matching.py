"""Test accuracy of every matching method and selection rule under one evaluator, over several synthesis seeds.

All rows share data, budget, networks, protocol and seeds, so differences are paired by seed: every row against random
real images, every method wrapped by FYI against the method itself, and every one whose latents are fused with names
against the same without. With ``--protocols dsa fyi`` sets are scored under both dialects of augmentation, which makes
the 2x2 of FYI: a gain within one protocol is the wrapper's, a difference between protocols is the evaluator's.

Plans: "short" for two CPU cores, every method with about the same time; "drawn" for those that draw their images, on
digits, each with and without fusion, from the same models; "drawn_gpu" for some of them, with models for a GPU;
"published" takes the settings of the papers (`Synthesizer.preset`) and wants a GPU. Sets and scores stay in ``--runs``:
the same command continues.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dsdistill as dd
from benchmarks.quality.cifar10_dm import slug
from benchmarks.quality.plans import PLANS, Plan
from benchmarks.schema import RESULTS
from benchmarks.writing import commit, write_result
from dsdistill.core import storage
from dsdistill.core.config import to_dict
from dsdistill.core.device import resolve_device
from dsdistill.data import ImageSource
from dsdistill.engine import Synthesizer
from dsdistill.evaluation import EvaluationProtocol, Score, paired_difference
from dsdistill.generative.method import Drawing
from dsdistill.matching import TrajectoryMatching
from dsdistill.methods import Diffusion
from dsdistill.networks import NetworkSpec

RANDOM = "RandomReal"


@dataclass(frozen=True)
class Row:
    """A method under a protocol: by seed the mean accuracy of its networks, and the seconds of its syntheses.

    ``loss`` is the mean over seeds of that of the first and of the last tenth of the steps, where there are any.
    """

    method: Synthesizer
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, float] | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", default="digits", help="digits, or an image folder or name looked up in DSDISTILL_DATA"
    )
    parser.add_argument("--per_class", type=int, help="take the first so many training images of each class alone")
    parser.add_argument("--jpeg", action="store_true", help="the images went through JPEG; shown beside every figure")
    parser.add_argument("--plan", choices=PLANS, default="digits")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument(
        "--methods", nargs="+", help="rows of the plan to make; default: all. RandomReal is always made"
    )
    parser.add_argument("--protocols", nargs="+", default=argparse.SUPPRESS, help="default: the plan's")
    parser.add_argument("--seeds", type=int, default=argparse.SUPPRESS, help="synthesis seeds")
    parser.add_argument("--networks", type=int, default=argparse.SUPPRESS, help="networks per seed")
    parser.add_argument("--network", default=argparse.SUPPRESS, help="name of the network of the evaluation")
    parser.add_argument("--epochs", type=int, default=argparse.SUPPRESS, help="epochs of the evaluation")
    parser.add_argument("--tag", default="", help="added to the name of the result file")
    parser.add_argument("--device")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of sets and scores, kept for resuming")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    asked = {name: value for name, value in vars(options).items() if name in ("seeds", "networks", "epochs")}
    asked |= {"network": NetworkSpec(options.network)} if "network" in options else {}
    part = f"{options.per_class}per-class" if options.per_class else ""
    plan: Plan = replace(PLANS[options.plan], **asked)
    device, started = resolve_device(options.device), commit()
    source = first_of_each_class(dd.data.load(options.data, device=device), options.per_class)
    methods = plan.methods(options.ipc)
    chosen = {name: methods[name] for name in dict.fromkeys([RANDOM, *(options.methods or methods)])}
    protocols = {name: plan.protocol(name) for name in getattr(options, "protocols", [plan.default])}
    folder = options.runs / "-".join(
        word for word in (plan.family, slug(source.name), part, options.plan, f"ipc{options.ipc}") if word
    )
    rows = {name: scored(method, source, plan, protocols, folder / slug(name)) for name, method in chosen.items()}
    content = {
        "kind": "family",
        "title": f"{source.name}{' (JPEG)' if options.jpeg else ''}, "
        f"{f'{options.per_class} images per class, ' if part else ''}IPC {options.ipc}, plan {options.plan!r}",
        "data": {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "train_images": len(source),
            "test_images": len(source.test),
            "jpeg": options.jpeg,
        },
        "ipc": options.ipc,
        "networks": plan.networks,
        "protocols": {name: to_dict(protocol) for name, protocol in protocols.items()},
        "rows": [
            line
            for name in protocols
            for line in lines(name, {key: row[name] for key, row in rows.items()}, plan.bases)
        ],
    }
    kind = [options.plan] if options.plan != plan.family else []
    words = [f"quality-{plan.family}", slug(source.name), part, *kind, f"ipc{options.ipc}", options.tag, device.type]
    path = options.results / f"{'-'.join(word for word in words if word)}.json"
    write_result(path, content, seed=0, started=started, device=device)
    print(f"written to {path}")


def first_of_each_class(source: ImageSource, count: int | None) -> ImageSource:
    """The source with the first ``count`` training images of each class, or as it is."""
    if count is None:
        return source
    starts = zip(source.offsets, source.counts, strict=False)
    return source.subset(torch.cat([torch.arange(first, first + min(count, there)) for first, there in starts]))


def scored(
    method: Synthesizer, source: ImageSource, plan: Plan, protocols: Mapping[str, EvaluationProtocol], folder: Path
) -> dict[str, Row]:
    """A row for each protocol; what is found in ``folder`` is not made again."""
    accuracy: dict[str, list[float]] = {name: [] for name in protocols}
    seconds, losses = [], []
    for seed in range(plan.seeds):
        out = folder / f"seed{seed}"
        clock = out.with_suffix(".seconds.json")
        store = folder.parent / "store"
        followed = getattr(method, "base", method)
        if isinstance(followed, TrajectoryMatching):  # the first to ask for experts would pay for all who share them
            dd.train_experts(
                source,
                followed.experts,
                followed.network,
                epochs=followed.last_epoch,
                store=store,
                device=source.device,
            )
        if isinstance(method, Drawing):  # and so would the first to ask for models
            dd.synthesize(Diffusion(ipc=1, models=method.models), source, device=source.device, store=store)
        begin = time.perf_counter()
        made = dd.synthesize(method, source, seed=seed, device=source.device, out=out, store=store)
        if not clock.exists():  # of a run that was interrupted, it is the time of its last part
            storage.write_json(clock, {"seconds": time.perf_counter() - begin})
        seconds.append(storage.read_json(clock)["seconds"])
        losses.append(ends_of_loss(out / "run" / "metrics.jsonl"))
        for name, protocol in protocols.items():
            network = slug(protocol.network.name)
            kept = out.with_suffix(f".{slug(name)}-{network}-{protocol.epochs}-{plan.networks}.json")
            if not kept.exists():
                options: dict[str, Any] = {"repeats": plan.networks, "baselines": (), "seed": seed}
                result = dd.evaluate(made, source, protocol=protocol, device=source.device, **options)
                storage.write_json(kept, result.to_json())
            values = json.loads(kept.read_text())["scores"]["synthetic"]["values"]
            accuracy[name].append(sum(values) / len(values))
    for name, values in accuracy.items():
        print(f"{method.title:16s} {name:5s} {Score(tuple(values))}  {sum(seconds) / len(seconds):.0f} s", flush=True)
    ends = [one for one in losses if one is not None]
    loss = (statistics.mean(one for one, _ in ends), statistics.mean(one for _, one in ends)) if ends else None
    return {name: Row(method, tuple(values), tuple(seconds), loss) for name, values in accuracy.items()}


def ends_of_loss(log: Path) -> tuple[float, float] | None:
    """Mean loss of the first and of the last tenth of the steps of a run, or None where it has none."""
    told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    # A sum of several distances tells less than the last of them, which is what other methods call their loss.
    values = [one.get("distance", one["loss"]) for one in told if "loss" in one]
    tenth = -(-len(values) // 10)
    return (statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])) if values else None


def lines(protocol: str, rows: Mapping[str, Row], bases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of the record: scores over seeds, and differences paired by seed."""
    return [
        {
            "method": name,
            "base": bases.get(name),
            "settings": to_dict(row.method),
            "protocol": protocol,
            "seconds": list(row.seconds),
            "loss": row.loss,
            "accuracy": Score(row.accuracy).to_json(),
            "gain_over_random": None if name == RANDOM else _difference(row, rows[RANDOM]),
            "gain_over_base": _difference(row, rows[base]) if (base := _base(name, bases)) in rows else None,
        }
        for name, row in rows.items()
    ]


def _base(name: str, bases: Mapping[str, str]) -> str:
    return name.removeprefix("FYI+") if name.startswith("FYI+") else bases.get(name, "")


def _difference(row: Row, other: Row) -> dict[str, Any]:
    return paired_difference(row.accuracy, other.accuracy).to_json()


if __name__ == "__main__":
    main()
