"""Does the decoupled line stay flat in memory up to 1,000 classes, and what would the real run cost?

For each number of classes a fresh process recovers one image for each class of random 32 x 32 images with a small
random teacher, in chunks of 100 classes, and another labels that set. Peaks are of resident memory; what a set and the
labels themselves take is beside them. Then the real thing is projected: bytes of labels exactly, from the format,
beside the published sizes; time from a step and from labelling of a torchvision ResNet-18 at 224 pixels, measured here.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.schema import RESULTS, ROOT
from benchmarks.writing import commit, write_result
from dsdistill.core.device import settle_allocator

SIDE, CHUNK = 32, 100
PUBLISHED_GIB = {10: 5.67, 50: 28.33, 200: 113.33}
"""Labels of SRe2L on ImageNet-1K, 300 epochs, by images per class, as the literature lists them."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--iterations", type=int, default=5, help="of recovery")
    parser.add_argument("--epochs", type=int, default=3, help="of labels")
    parser.add_argument("--projected", type=int, default=10, help="images of the step at 224 pixels that is timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale-cpu.json")
    parser.add_argument("--measure", choices=("recover", "label", "imports"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options)))
        return
    started = commit()
    points = []
    for count in sorted(options.classes):
        with tempfile.TemporaryDirectory() as folder:
            point = {"classes": count}
            for what in ("recover", "label"):
                point |= measured(what, count, Path(folder), options)
        points.append(point)
        print(json.dumps(point), flush=True)
    content = {
        "kind": "scale",
        "title": f"1 image per class of {SIDE}x{SIDE}, ConvNet teacher of width 16, {CHUNK} classes a problem",
        "settings": {"iterations": options.iterations, "epochs": options.epochs, "chunk": CHUNK},
        "baseline_mib": measured("imports", 0, Path(), options)["peak_mib"],
        "points": points,
        "projections": projections(options),
    }
    write_result(options.out, content, seed=options.seed, started=started)
    print(f"written to {options.out}")


def measured(what: str, classes: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process measured."""
    line = [sys.executable, "-m", "benchmarks.scale", "--measure", what, "--classes", str(classes)]
    line += ["--folder", str(folder), "--iterations", str(options.iterations), "--epochs", str(options.epochs)]
    done = subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_imports(_options: argparse.Namespace) -> dict[str, float]:
    """Memory before any work."""
    import dsdistill as dd

    assert dd.data.load
    assert dd.relabel
    return {"peak_mib": peak_mib()}


def make_source(classes: int, seed: int) -> Any:
    """Two random images of each class."""
    from dsdistill.data import ImageSource

    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2 * classes, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    names = [f"class {number:04d}" for number in range(classes)]
    return ImageSource("random images", names, images, torch.arange(classes).repeat_interleave(2))


def measure_recover(options: argparse.Namespace) -> dict[str, Any]:
    """Recover and save; the teacher is left for who labels."""
    import dsdistill as dd
    from dsdistill.experts import Teacher, Teachers
    from dsdistill.networks import NetworkSpec

    (classes,) = options.classes
    settle_allocator(torch.device("cpu"))
    source = make_source(classes, options.seed)
    spec = NetworkSpec(width=16, norm="batch")
    network = spec.build(source.shape, classes, generator=torch.Generator().manual_seed(0), device="cpu")
    with torch.no_grad():
        network(source.gather(torch.arange(100)))
    normal = source.normalization
    teacher = Teacher("small", spec, network, source.classes, source.shape, normal, accuracy=0.0)
    teacher.save(options.folder / "teacher")
    teachers = Teachers(folder=str(options.folder / "teacher"))
    method = dd.methods.SRe2L(ipc=1, iterations=options.iterations, classes_together=CHUNK, teachers=teachers)
    begin = time.perf_counter()
    made = dd.synthesize(method, source, device="cpu", out=options.folder / "set", progress=False)
    return {
        "recover_seconds": time.perf_counter() - begin,
        "recover_peak_mib": peak_mib(),
        "set_mib": made.nbytes.total / 2**20,
    }


def measure_label(options: argparse.Namespace) -> dict[str, Any]:
    """Label the set, batches of 100 in two halves."""
    import dsdistill as dd
    from dsdistill.evaluation import get_protocol

    settle_allocator(torch.device("cpu"))
    synthetic = dd.SyntheticDataset.load(options.folder / "set")
    committee = dd.Committee.load(options.folder / "teacher")
    protocol = replace(get_protocol("sre2l"), batch_size=100, epochs=options.epochs)
    begin = time.perf_counter()
    labels = dd.relabel(synthetic, committee, protocol, device="cpu", out=options.folder / "labels", progress=False)
    return {
        "label_seconds": time.perf_counter() - begin,
        "label_peak_mib": peak_mib(),
        "labels_mib": labels.nbytes / 2**20,
    }


MEASURES = {"imports": measure_imports, "recover": measure_recover, "label": measure_label}


def projections(options: argparse.Namespace) -> list[dict[str, Any]]:
    """ImageNet-1K under SRe2L: bytes of labels, and seconds of recovery and labelling on this machine."""
    step, view = seconds_at_224(options.projected)
    return [
        {
            "ipc": ipc,
            "label_bytes": label_bytes(1000 * ipc),
            "published_gib": published,
            "recover_seconds": 10 * ipc * 4000 * step * (CHUNK / options.projected),
            "label_seconds": 300 * 1000 * ipc * view,
        }
        for ipc, published in PUBLISHED_GIB.items()
    ]


def label_bytes(images: int) -> int:
    """Of 300 epochs of 16-bit logits of 1,000 classes, batches of 1,024 under CutMix, records included."""
    from dsdistill.evaluation import get_protocol
    from dsdistill.relabelling import get_codec
    from dsdistill.relabelling.heading import Heading

    return Heading(
        kind="replayed",
        classes=tuple(f"n{number:08d}" for number in range(1000)),
        count=images,
        shape=(3, 224, 224),
        images="0" * 64,
        teachers=({"name": "resnet18", "digest": "0" * 64, "accuracy": 0.7},),
        weights=(1.0,),
        vote_temperature=None,
        teacher_mode="eval",
        recipe=get_protocol("sre2l"),
        epochs=300,
        codec=get_codec("float16"),
        calibration=None,
        records="stored",
        seed=0,
    ).predicted_bytes()


def seconds_at_224(images: int) -> tuple[float, float]:
    """Of a step of recovery of so many images, and of labelling one view."""
    from torchvision.models import resnet18

    from dsdistill.networks import MeasuredNetwork

    settle_allocator(torch.device("cpu"))
    teacher = MeasuredNetwork(resnet18())
    teacher.module.to(memory_format=torch.channels_last)
    batch = torch.randn(images, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        logits, distances = teacher(batch.requires_grad_())
        middle = time.perf_counter()
        torch.autograd.grad(logits.sum() + distances.sum(), batch)
        times.append((time.perf_counter() - begin, (middle - begin) / images))
    return min(times)


if __name__ == "__main__":
    main()
