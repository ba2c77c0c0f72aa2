"""Trajectory matching by the exact gradient of its unroll and by the truncated one (TESLA's), at equal compute.

The truncated gradient leaves the products with Hessians out: a step of it is cheaper and its direction a little wrong.
Whether that pays is asked here. All rows share data, experts, seeds and protocol; the same seed starts from the same
images, and differences are paired by seed. A row of the truncated gradient makes as many more steps as its steps are
cheaper. What a step costs is counted in floating point operations of convolutions and matrix products, not timed: the
number of steps, hence the result, must not depend on the machine or on who else uses it. Seconds are given beside it.

The truncated gradient of the images is 1.1 to 2.5 times as long as the exact one, that of the student's step size up to
5 times, so it is given several step sizes: each factor multiplies those of the images and of the student's step size.
The exact gradient keeps what its plan says; the best of several truncated rows is picked afterwards, in its favour.

Sets and scores stay in ``--runs``: the same command continues.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dsdistill as dd
from benchmarks.quality.cifar10_dm import slug
from benchmarks.quality.matching import Row, ends_of_loss, first_of_each_class, scored
from benchmarks.quality.plans import PLANS, Plan
from benchmarks.schema import RESULTS
from benchmarks.writing import commit, write_result
from dsdistill.core.config import to_dict
from dsdistill.core.device import resolve_device
from dsdistill.data import ImageSource
from dsdistill.engine import Job
from dsdistill.engine.run import prepared_run
from dsdistill.evaluation import paired_difference
from dsdistill.methods import MTT

Way = Literal["sweep", "truncated"]
EXACT: Way = "sweep"


@dataclass(frozen=True)
class Variant:
    """A way to differentiate, the factor of its step sizes, and floating point operations of one step."""

    way: Way
    factor: float
    flops: int
    method: MTT

    @property
    def name(self) -> str:
        return f"{self.way} x{self.factor:g}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="digits", help="digits, or an image folder or name looked up in DSDISTILL_DATA"
    )
    parser.add_argument("--per_class", type=int, help="take the first so many training images of each class alone")
    parser.add_argument("--jpeg", action="store_true", help="the images went through JPEG; shown beside every figure")
    parser.add_argument("--plan", choices=PLANS, default="digits", help="whose MTT and evaluation are taken")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--exact", nargs="+", type=float, default=[1.0], help="factors of step sizes")
    parser.add_argument("--truncated", nargs="+", type=float, default=[1.0, 0.5, 0.25], help="factors of step sizes")
    parser.add_argument("--protocol", default="mtt")
    parser.add_argument("--seeds", type=int, default=argparse.SUPPRESS, help="synthesis seeds; default: the plan's")
    parser.add_argument("--networks", type=int, default=argparse.SUPPRESS, help="networks per seed")
    parser.add_argument("--epochs", type=int, default=argparse.SUPPRESS, help="epochs of the evaluation")
    parser.add_argument("--device")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of sets and scores, kept for resuming")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    asked = {name: value for name, value in vars(options).items() if name in ("seeds", "networks", "epochs")}
    plan: Plan = replace(PLANS[options.plan], **asked)
    device, started = resolve_device(options.device), commit()
    part = f"{options.per_class}per-class" if options.per_class else ""
    source = first_of_each_class(dd.data.load(options.data, device=device), options.per_class)
    words = ["gradients", slug(source.name), part, options.plan, f"ipc{options.ipc}"]
    folder = options.runs / "-".join(word for word in words if word)
    base = plan.methods(options.ipc)["MTT"]
    assert isinstance(base, MTT)
    variants = make_variants(base, source, options.exact, options.truncated, folder / "store")
    protocol = plan.protocol(options.protocol)
    rows, losses = [], []
    for variant in variants:
        place = folder / slug(variant.name)
        rows.append(scored(variant.method, source, plan, {options.protocol: protocol}, place)[options.protocol])
        losses.append([last_loss(place / f"seed{seed}") for seed in range(plan.seeds)])
    content = {
        "kind": "gradients",
        "title": f"MTT on {source.name}{' (JPEG)' if options.jpeg else ''}, "
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
        "protocol": to_dict(protocol),
        "rows": lines(variants, rows, losses),
    }
    path = options.results / f"{'-'.join(word for word in ['quality', *words, device.type] if word)}.json"
    write_result(path, content, seed=0, started=started, device=device)
    print(f"written to {path}")


def make_variants(
    base: MTT, source: ImageSource, exact: Sequence[float], truncated: Sequence[float], store: Path
) -> list[Variant]:
    """The rows: ``base`` by both gradients with each factor, for as much work as its own steps by the exact one.

    The first is what the others are compared with. Experts are trained unless ``store`` has them.
    """
    exactly, shortly = (replace(base, backward=way) for way in (EXACT, "truncated"))
    each = {EXACT: flops_of_step(exactly, source, store), "truncated": flops_of_step(shortly, source, store)}
    work = base.iterations * each[EXACT]
    return [
        Variant(way, factor, each[way], _scaled(method, factor, max(1, round(work / each[way]))))
        for way, method, factors in ((EXACT, exactly, exact), ("truncated", shortly, truncated))
        for factor in factors
    ]


def _scaled(method: MTT, factor: float, iterations: int) -> MTT:
    return replace(method, lr_images=factor * method.lr_images, lr_lr=factor * method.lr_lr, iterations=iterations)


def flops_of_step(method: MTT, source: ImageSource, store: Path) -> int:
    """Floating point operations of convolutions and matrix products in a step of ``method``."""
    job = Job("all", tuple(range(source.num_classes)))
    run = prepared_run(method, source, seed=0, device=source.device, chunk=None, store=store).scoped(job)
    method.prepare(run)
    state = method.start(run, job)
    with FlopCounter() as counter:
        method.step(run, state, 0)
    return counter.total


class FlopCounter(TorchDispatchMode):
    """Counts while it is active, in ``total``. (`torch.utils.flop_counter.FlopCounterMode` also follows modules, which
    fails under `torch.autograd.grad`.)"""

    total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


def last_loss(run: Path) -> float:
    """Mean loss of the last tenth of a run's steps: each looks at another piece of a trajectory."""
    ends = ends_of_loss(run / "run" / "metrics.jsonl")
    assert ends is not None
    return ends[1]


def lines(variants: Sequence[Variant], rows: Sequence[Row], losses: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Rows of the record; differences are paired by seed."""
    first = rows[0]
    return [
        {
            "backward": variant.way,
            "factor": variant.factor,
            "settings": to_dict(variant.method),
            "iterations": variant.method.iterations,
            "step_flops": variant.flops,
            "seconds": list(row.seconds),
            "loss": list(loss),
            "accuracy": dd.evaluation.Score(row.accuracy).to_json(),
            "difference": None if row is first else paired_difference(row.accuracy, first.accuracy).to_json(),
        }
        for variant, row, loss in zip(variants, rows, losses, strict=True)
    ]


if __name__ == "__main__":
    main()
