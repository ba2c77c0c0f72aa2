"""Does peak memory grow with the data? Folders of 64 x 64 images, decoded into a cache and drawn from.

For each size two fresh processes: one builds the cache, one opens it, makes draws of ten classes and a whole pass.
Peaks are those of resident memory (Linux: VmHWM, which a process does not inherit from the one that started it).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.schema import RESULTS, ROOT, Growth
from benchmarks.writing import commit, write_result

CLASSES, TEST_PER_CLASS, SIDE = 10, 10, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the images and the cache; both are removed afterwards")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--per-class", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-curve-cpu.json")
    parser.add_argument("--measure", choices=list(_MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_MEASURES[options.measure](options)))
        return
    started = commit()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        content = curve(options, Path(folder))
    write_result(options.out, content, seed=options.seed, started=started)
    print(f"written to {options.out}")


def curve(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements, and the content of the result."""
    images, points = folder / "images", []
    baseline = measured("imports", options, images, folder)["peak_mib"]
    write_images(images / "test", 0, CLASSES * TEST_PER_CLASS, options.seed)
    present = 0
    for size in sorted(options.sizes):
        write_images(images / "train", present, size, options.seed)
        present = size
        built = measured("build", options, images, folder)
        drawn = measured("draw", options, images, folder)
        shutil.rmtree(folder / "cache")
        points.append({"images": size, **built, **drawn})
        print(json.dumps(points[-1]), flush=True)
    growth = {
        name: Growth.of([point["images"] for point in points], [point[f"{name}_peak_mib"] for point in points])
        for name in ("build", "draw")
    }
    return {
        "kind": "memory",
        "title": f"Cache of {SIDE}x{SIDE} colour images",
        "settings": {"classes": CLASSES, "draws": options.draws, "per_class": options.per_class},
        "baseline_mib": baseline,
        "points": points,
        "growth": {name: one.model_dump() for name, one in growth.items()},
    }


def write_images(folder: Path, first: int, last: int, seed: int) -> None:
    """PNG files ``first`` to ``last``, dealt out to the classes: 8 x 8 random colours, enlarged, with some noise."""
    for number in range(CLASSES):
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng((seed, first))
    noise = draw.integers(0, 16, (64, SIDE, SIDE, 3), dtype=np.uint8)
    for index in range(first, last):
        coarse = draw.integers(0, 240, (8, 8, 3), dtype=np.uint8)
        pixels = coarse.repeat(SIDE // 8, 0).repeat(SIDE // 8, 1) + noise[index % 64]
        Image.fromarray(pixels).save(folder / str(index % CLASSES) / f"{index:07}.png", compress_level=1)


def measured(what: str, options: argparse.Namespace, images: Path, folder: Path) -> dict[str, float]:
    """What a fresh process measured."""
    line = [sys.executable, "-m", "benchmarks.memory_curve", str(images), "--measure", what]
    line += ["--draws", str(options.draws), "--per-class", str(options.per_class), "--seed", str(options.seed)]
    environment = {**os.environ, "DSDISTILL_CACHE": str(folder / "cache")}
    done = subprocess.run(line, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


# -- in the processes --------------------------------------------------------------------------------------------


def measure_imports(_options: argparse.Namespace) -> dict[str, float]:
    """Memory before any work."""
    import dsdistill as dd

    assert dd.data.load
    return {"peak_mib": peak_mib()}


def measure_build(options: argparse.Namespace) -> dict[str, float]:
    """Decode into the cache."""
    import dsdistill as dd

    begin = time.perf_counter()
    with ChildrenPeak() as children:
        source = dd.data.load(options.folder, storage="cache")
    seconds = time.perf_counter() - begin
    file_mib = len(source) * source.store.row_bytes / 2**20
    return {
        "file_mib": file_mib,
        "build_seconds": seconds,
        "build_peak_mib": peak_mib(),
        "worker_peak_mib": children.mib,
    }


def measure_draw(options: argparse.Namespace) -> dict[str, float]:
    """Open the cache, make draws of all classes, and pass through all images once."""
    import torch

    import dsdistill as dd

    begin = time.perf_counter()
    source = dd.data.load(options.folder, storage="cache")
    opened = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.draws):
        source.per_class(range(CLASSES), options.per_class, generator)
    drawn = time.perf_counter()
    total = sum(len(batch.targets) for batch in source.batches(256))
    assert total == len(source)
    return {
        "open_seconds": opened - begin,
        "draw_seconds": drawn - opened,
        "pass_seconds": time.perf_counter() - drawn,
        "draw_peak_mib": peak_mib(),
    }


_MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "imports": measure_imports,
    "build": measure_build,
    "draw": measure_draw,
}


def peak_mib(pid: str = "self") -> float:
    """Largest resident memory of a process so far."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**10 if "VmHWM" in lines else 0.0  # a process that has just ended


class ChildrenPeak:
    """A context manager that watches the processes started by this one, on Linux; ``mib`` is the largest peak."""

    def __enter__(self) -> "ChildrenPeak":
        self._over = threading.Event()
        self._peaks: dict[str, float] = {}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        """0 where there were none, or this is not Linux."""
        return max(self._peaks.values(), default=0.0)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for task in Path("/proc/self/task").glob("*/children"):
                for child in task.read_text().split():
                    try:
                        # The latest counts: a process that is just being started still has the memory of this one.
                        self._peaks[child] = peak_mib(child) or self._peaks.get(child, 0.0)
                    except OSError:  # ended meanwhile
                        continue


if __name__ == "__main__":
    main()
