"""Test accuracy of the decoupled methods under one protocol with one committee's labels, over several synthesis seeds.

A committee is trained and its prior performances are measured; every method recovers or chooses images with it, or with
one of its members; the whole committee labels every set, and networks learn those labels. All rows share data, budget,
committee, protocol and seeds, so differences are paired by seed; random real images are labelled alike. The column of
hard labels has networks that are trained on classes alone, under the same protocol. Bytes are those of the stored
images, and of the labels as 16-bit numbers, for all epochs.

Everything stays in ``--runs``: the same command continues.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dsdistill as dd
from benchmarks.quality.cifar10_dm import slug
from benchmarks.quality.matching import first_of_each_class
from benchmarks.schema import RESULTS
from benchmarks.writing import commit, write_result
from dsdistill.augmentations import CutMix, ResizedCrop
from dsdistill.core import storage
from dsdistill.core.config import to_dict
from dsdistill.core.device import resolve_device
from dsdistill.data import ImageSource
from dsdistill.engine import Synthesizer
from dsdistill.evaluation import EvaluationProtocol, Score, get_protocol, paired_difference
from dsdistill.evaluation.result import HARD
from dsdistill.experts import Committee, Teachers, teacher_name, train_teachers
from dsdistill.methods import CDA, CVDD, INFER, NRRDD, RDED, SRe2L
from dsdistill.methods.random_real import RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.studies.prior import measure_priors
from dsdistill.training import TrainingRecipe

RANDOM = "RandomReal"
ROWS = ("synthetic", f"synthetic{HARD}")


@dataclass(frozen=True)
class Plan:
    """Committee, budgets and protocol; ``recovery`` are settings of methods that recover images, ``steps`` theirs."""

    networks: tuple[NetworkSpec, ...]
    training: TrainingRecipe
    recovery: Mapping[str, Any]
    protocol: EvaluationProtocol
    steps: int = 300
    pool: int = 100
    seeds: int = 3
    repeats: int = 1

    def methods(self, ipc: int, folder: Path) -> dict[str, Synthesizer]:
        """Rows by name."""
        names = [teacher_name(spec) for spec in self.networks]
        alone = {name: Teachers(folder=str(folder / name)) for name in names}
        every, first = Teachers(folder=str(folder)), alone[names[0]]
        shared: dict[str, Any] = {"ipc": ipc, "iterations": self.steps, **self.recovery}
        return {
            RANDOM: RandomReal(ipc=ipc),
            "RDED": RDED(ipc=ipc, pool=self.pool, teachers=first),
            "SRe2L": SRe2L(**shared, teachers=first),
            "CDA": CDA(**shared | {"crop": True}, teachers=first),  # without crops it is SRe2L
            **{f"SRe2L++, {name}": SRe2L(**shared, init="patches", teachers=one) for name, one in alone.items()},
            "CVDD": CVDD(**shared, teachers=every),
            "NRRDD": NRRDD(ipc=ipc, iterations=self.steps, teachers=first),
            **({"INFER": INFER(**shared, teachers=every)} if ipc > 1 else {}),  # one image has no room for compensators
        }


def _networks(*widths: int, depth: int | None = None) -> tuple[NetworkSpec, ...]:
    return tuple(NetworkSpec(width=width, depth=depth, norm="batch") for width in widths)


PLANS = {
    # 8x8 digits: crops of a twelfth of the area show nothing, so views of students and recovery are milder.
    "digits": Plan(
        _networks(32, 24, depth=2),
        TrainingRecipe(epochs=30, batch_size=64, lr=0.05, schedule="cosine"),
        {"crop": False, "shift": 1, "statistics_weight": 0.05, "problems_together": 10},
        replace(
            get_protocol("cvdd"),
            network=NetworkSpec(width=32, depth=2, norm="batch"),
            epochs=300,
            augmentation=ResizedCrop(scale=(0.5, 1.0)),
            mix=CutMix(probability=0.5),
        ),
        seeds=4,
    ),
    # CIFAR-10 with networks of a third of the usual width: a row takes two to three minutes for each seed on one core.
    "short": Plan(
        _networks(48, 32),
        TrainingRecipe(
            epochs=20, batch_size=64, lr=0.05, schedule="cosine", augmentation=ResizedCrop(scale=(0.5, 1.0))
        ),
        {"shift": 4, "statistics_weight": 0.05, "problems_together": 5},
        replace(get_protocol("cvdd"), network=NetworkSpec(width=48, norm="batch"), epochs=60),
        steps=150,
    ),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or an image folder or name of DSDISTILL_DATA")
    parser.add_argument("--per_class", type=int, help="take the first so many training images of each class alone")
    parser.add_argument("--jpeg", action="store_true", help="the images went through JPEG; shown beside every figure")
    parser.add_argument("--plan", choices=PLANS, default="digits")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--methods", nargs="+", help="rows of the plan to make; default: all. Random is always made")
    parser.add_argument("--seeds", type=int, default=argparse.SUPPRESS, help="synthesis seeds; default: the plan's")
    parser.add_argument("--repeats", type=int, default=argparse.SUPPRESS, help="networks per seed")
    parser.add_argument("--device")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of sets and scores, kept for resuming")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    asked = {name: value for name, value in vars(options).items() if name in ("seeds", "repeats")}
    plan: Plan = replace(PLANS[options.plan], **asked)
    device, started = resolve_device(options.device), commit()
    part = f"{options.per_class}per-class" if options.per_class else ""
    source = first_of_each_class(dd.data.load(options.data, device=device), options.per_class)
    words = [word for word in (slug(source.name), part, options.plan, f"ipc{options.ipc}") if word]
    folder = options.runs / "-".join(["decoupled", *words])
    committee = make_committee(plan, source, options.ipc, folder / "teachers")
    methods = plan.methods(options.ipc, folder / "teachers")
    chosen = [RANDOM, *(name for name in methods if name in (options.methods or methods) and name != RANDOM)]
    rows = {name: scored(name, methods[name], plan, source, committee, folder / slug(name)) for name in chosen}
    content = {
        "kind": "taught",
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
        "networks": plan.repeats,
        "protocol": to_dict(plan.protocol),
        "teachers": [
            {"name": one.name, "accuracy": one.accuracy, "performance": one.performance, "digest": one.digest}
            for one in committee
        ],
        "rows": [line(name, methods[name], rows) for name in chosen],
    }
    path = options.results / f"{'-'.join(['quality-decoupled', *words, device.type])}.json"
    write_result(path, content, seed=0, started=started, device=device)
    print(f"written to {path}")


def make_committee(plan: Plan, source: ImageSource, ipc: int, folder: Path) -> Committee:
    """The committee with its priors, trained and measured unless it is there."""
    train_teachers(source, plan.networks, folder, plan.training, device=source.device)
    measured = SRe2L(ipc=ipc, iterations=plan.steps, init="patches", **plan.recovery)
    measure_priors(folder, source, measured, protocol=plan.protocol, seed=1000, device=source.device)
    return Committee.load(folder, source.device)


def scored(
    name: str, method: Synthesizer, plan: Plan, source: ImageSource, committee: Committee, folder: Path
) -> list[dict[str, Any]]:
    """By seed: seconds, bytes and accuracies; what is found in ``folder`` is not made again."""
    found = []
    for seed in range(plan.seeds):
        kept = folder / f"seed{seed}.json"
        if not kept.exists():
            begin = time.perf_counter()
            made = dd.synthesize(method, source, seed=seed, device=source.device, out=folder / f"seed{seed}")
            seconds = time.perf_counter() - begin
            labels = dd.relabel(
                made,
                committee,
                plan.protocol,
                teacher_mode=plan.protocol.teacher_mode,
                temperature=10.0,
                mirror_safe=source.mirror_safe,
                seed=seed,
                device=source.device,
                out=folder / f"seed{seed}-labels",
            )
            result = dd.evaluate(
                made,
                source,
                protocol=plan.protocol,
                labels=labels,
                repeats=plan.repeats,
                baselines=(),
                seed=seed,
                device=source.device,
            )
            accuracies = {row: result.scores[row].mean for row in ROWS}
            told = {"seconds": seconds, "images": made.nbytes.images, "labels": labels.nbytes, "accuracy": accuracies}
            storage.write_json(kept, told)
        found.append(storage.read_json(kept))
    soft, hard = (Score(tuple(one["accuracy"][row] for one in found)) for row in ROWS)
    print(f"{name:24s} soft {soft}  hard {hard}", flush=True)
    return found


def line(name: str, method: Synthesizer, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row of the record: scores over seeds, and differences from random images, paired by seed."""

    def values(of: str, row: str) -> tuple[float, ...]:
        return tuple(one["accuracy"][row] for one in rows[of])

    def gain(row: str) -> dict[str, Any] | None:
        return None if name == RANDOM else paired_difference(values(name, row), values(RANDOM, row)).to_json()

    own = rows[name]
    return {
        "method": name,
        "settings": to_dict(method) | {"teachers": None},
        "seconds": [one["seconds"] for one in own],
        "image_bytes": own[0]["images"],
        "label_bytes": own[0]["labels"],
        "soft": Score(values(name, ROWS[0])).to_json(),
        "hard": Score(values(name, ROWS[1])).to_json(),
        "soft_gain": gain(ROWS[0]),
        "hard_gain": gain(ROWS[1]),
    }


if __name__ == "__main__":
    main()
