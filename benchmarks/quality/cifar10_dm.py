"""Test accuracy of a distilled set beside random real images (and the whole set), one result file per IPC.

``--preset published`` takes the settings of the DM paper, for a GPU; without it a short run for a CPU.
"""

import argparse
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dsdistill as dd
from benchmarks.schema import RESULTS
from benchmarks.writing import commit, write_result
from dsdistill.core.config import to_dict
from dsdistill.core.device import resolve_device
from dsdistill.data import ImageSource
from dsdistill.engine import Synthesizer
from dsdistill.evaluation import EvaluationProtocol, EvaluationResult, get_protocol

# Zhao & Bilen, WACV 2023, table 1, CIFAR-10: test accuracy of DM by IPC.
PUBLISHED = {1: 0.260, 10: 0.489, 50: 0.630}


@dataclass(frozen=True)
class Plan:
    """How much work: sizes of the synthesis and of the evaluation."""

    ipc: tuple[int, ...]
    iterations: int
    real_batch: int
    networks: int
    epochs: int


PRESETS = {
    "short": Plan(ipc=(10,), iterations=200, real_batch=64, networks=2, epochs=300),
    "published": Plan(ipc=(1, 10, 50), iterations=20_000, real_batch=256, networks=20, epochs=1000),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", default="cifar10", help="image folder with train/ and test/, or a name looked up in DSDISTILL_DATA"
    )
    parser.add_argument("--jpeg", action="store_true", help="the images went through JPEG; shown beside every figure")
    parser.add_argument("--preset", choices=PRESETS, default="short", help="defaults of the options below")
    parser.add_argument("--ipc", type=int, nargs="+", default=argparse.SUPPRESS)
    for name in ("iterations", "real-batch", "networks", "epochs"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--method", default="DM", help="DM, or RandomReal to see what the baseline row should say")
    parser.add_argument("--whole", action="store_true", help="train on the whole set too")
    parser.add_argument("--whole-epochs", type=int, help="epochs of that row; default: as many as the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the synthetic sets, kept for resuming"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def main() -> None:
    options = parse()
    asked = {name: value for name, value in vars(options).items() if name in vars(PRESETS["short"])}
    plan = replace(PRESETS[options.preset], **asked)
    device = resolve_device(options.device)
    source = dd.data.load(options.data, device=device)
    for ipc in plan.ipc:
        distil_and_score(options, plan, source, ipc, device)


def distil_and_score(
    options: argparse.Namespace, plan: Plan, source: ImageSource, ipc: int, device: torch.device
) -> None:
    """Make one set (or go on with it), score it and write its result."""
    method = make_method(options.method, plan, ipc)
    stem = f"quality-{slug(source.name)}-{options.method.lower()}-ipc{ipc}-{method.steps}steps-{device.type}"
    out = options.runs / f"{stem}-real{plan.real_batch}-seed{options.seed}"
    fresh, begin, started = not out.exists(), time.perf_counter(), commit()
    synthetic = dd.synthesize(method, source, seed=options.seed, device=device, out=out)
    seconds = time.perf_counter() - begin if fresh else None  # a resumed run has no time of its own
    scored = dd.evaluate(
        synthetic,
        source,
        protocol=make_protocol(plan.epochs),
        repeats=plan.networks,
        baselines=("random", "whole") if options.whole else ("random",),
        whole_epochs=options.whole_epochs,
        seed=options.seed,
        device=device,
    )
    print(scored)
    content = describe(source, ipc, method, scored, jpeg=options.jpeg)
    content |= {"synthesis_seconds": seconds, "published": published(options, source, ipc)}
    path = options.results / f"{stem}.json"
    write_result(path, content, seed=options.seed, started=started, device=device)
    print(f"written to {path}")


def make_method(name: str, plan: Plan, ipc: int) -> Synthesizer:
    """The method; its iterations and real batch are the plan's where it has such settings."""
    cls = dd.methods.get_method(name)
    wanted = {"iterations": plan.iterations, "real_batch": plan.real_batch}
    known = cls.__dataclass_fields__
    return cls(ipc=ipc, **{field: value for field, value in wanted.items() if field in known})


def make_protocol(epochs: int) -> EvaluationProtocol:
    """The protocol of the DM paper, renamed when its epochs are others."""
    protocol = get_protocol("dsa")
    if epochs == protocol.epochs:
        return protocol
    return replace(protocol, name=f"{protocol.name} (changed: epochs)", epochs=epochs)


def describe(
    source: ImageSource, ipc: int, method: Synthesizer, scored: EvaluationResult, *, jpeg: bool
) -> dict[str, Any]:
    """What was scored on what, and the scores."""
    rows = {
        row: {
            "images": scored.images[row],
            "epochs": scored.epochs[row],
            "seconds": scored.seconds[row],
            "accuracy": score.to_json(),
        }
        for row, score in scored.scores.items()
    }
    name = f"{source.name} (JPEG)" if jpeg else source.name
    return {
        "kind": "quality",
        "title": f"{type(method).__name__} on {name}, IPC {ipc}",
        "data": {
            "name": name,
            "fingerprint": source.fingerprint,
            "train_images": len(source),
            "test_images": len(source.test),
            "jpeg": jpeg,
        },
        "ipc": ipc,
        "method": {"name": type(method).__name__, **to_dict(method)},
        "protocol": to_dict(scored.protocol),
        "rows": rows,
        "gain_over_random": scored.gain.to_json() if scored.gain else None,
    }


def published(options: argparse.Namespace, source: ImageSource, ipc: int) -> float | None:
    """The paper's accuracy, where the settings are the paper's."""
    same = options.preset == "published" and options.method == "DM" and "cifar" in slug(source.name)
    return PUBLISHED.get(ipc) if same else None


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"


if __name__ == "__main__":
    main()
