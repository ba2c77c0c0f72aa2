"""Several fresh networks trained together against one after the other, on equal data and seeds.

    python -m benchmarks.speed.together

Each setting runs both ways in turn, in one process, after a warm-up; written to benchmarks/results.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.schema import RESULTS, Comparison
from benchmarks.speed.quiet import OtherLoad, wait_for_quiet
from benchmarks.writing import commit, write_result
from dsdistill.core.device import settle_allocator, synchronize
from dsdistill.core.rng import Rng
from dsdistill.evaluation import get_protocol
from dsdistill.evaluation.examine import fresh_network
from dsdistill.networks import NetworkSpec
from dsdistill.training import TrainingSet, train, train_together

SETTINGS = {  # networks, width (None: an MLP), images, their shape
    "4 ConvNets of width 128, 100 images 3x32x32": (4, 128, 100, (3, 32, 32)),
    "4 ConvNets of width 32, 100 images 3x32x32": (4, 32, 100, (3, 32, 32)),
    "10 ConvNets of width 64, 10 images 1x8x8": (10, 64, 10, (1, 8, 8)),
    "20 MLPs of width 128, 10 images 1x8x8": (20, None, 10, (1, 8, 8)),
}


Setting = tuple[int, int | None, int, tuple[int, int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="timings of each, in turn")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    started, device = commit(), torch.device(options.device)
    settle_allocator(device)
    comparisons: list[Comparison] = []
    differences: list[float] = []
    loads: list[float] = []
    for label, setting in SETTINGS.items():
        programs = make_programs(setting, options)
        differences.append(difference(programs["one by one"](), programs["together"]()))  # and a warm-up
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(options.runs):
            for name, program in programs.items():
                wait_for_quiet(0.15, patience=60)
                with OtherLoad() as others:
                    seconds[name].append(timed(program, device))
                loads.append(others.cores)
        comparisons.append(Comparison.of(label, *programs, *seconds.values()))
        print(label, seconds, differences[-1], flush=True)
    content = {
        "kind": "together",
        "title": f"networks trained together, {options.epochs} epochs",
        "comparisons": [one.model_dump() for one in comparisons],
        "largest_difference": max(differences),
        "other_load": round(max(loads), 3),
    }
    target = options.out or RESULTS / f"speed-together-{device.type}.json"
    write_result(target, content, seed=options.seed, started=started, device=device)


def make_programs(setting: Setting, options: argparse.Namespace) -> dict[str, Callable[[], list[nn.Module]]]:
    """The two ways of training the networks of a setting; each call gives the trained ones."""
    count, width, images, shape = setting
    device = torch.device(options.device)
    network = NetworkSpec("mlp") if width is None else NetworkSpec(width=width)
    protocol = replace(get_protocol("dsa"), epochs=options.epochs, network=network)
    pixels = torch.randn(images, *shape, generator=torch.Generator().manual_seed(options.seed))
    data = TrainingSet.of(pixels.to(device), (torch.arange(images) % 10).to(device))
    rngs = [Rng(options.seed, job=f"repeat/{repeat}", device=device) for repeat in range(count)]

    def alone() -> list[nn.Module]:
        networks = [fresh_network(protocol, shape, 10, rng) for rng in rngs]
        for made, rng in zip(networks, rngs, strict=True):
            train(made, data, protocol, rng, num_classes=10, mirror_safe=True)
        return networks

    def together() -> list[nn.Module]:
        networks = [fresh_network(protocol, shape, 10, rng) for rng in rngs]
        train_together(networks, [data] * count, protocol, rngs, num_classes=10, mirror_safe=True)
        return networks

    return {"one by one": alone, "together": together}


def difference(one: Sequence[nn.Module], other: Sequence[nn.Module]) -> float:
    """Largest difference of any parameter, relative to the largest parameter."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a.parameters(), b.parameters(), strict=True)]
    largest = max(float(a.detach().abs().max()) for a, _ in pairs)
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / largest


def timed(program: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    begin = time.perf_counter()
    program()
    synchronize(device)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
