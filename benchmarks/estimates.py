"""What `estimate` says of runs of every method, beside what the runs then take.

    python -m benchmarks.estimates

Each estimate and each run has a process of its own, on generated images. Written to benchmarks/results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dsdistill as dd
from benchmarks.schema import RESULTS, ROOT
from benchmarks.writing import commit, write_result
from dsdistill.core.config import to_dict
from dsdistill.core.device import peak_memory
from dsdistill.data import ImageSource
from dsdistill.training import TrainingRecipe


@dataclass(frozen=True)
class Setting:
    """A run on generated images; ``more`` are settings of the method beside those that all have."""

    size: int
    classes: int
    ipc: int
    real_batch: int
    width: int
    steps: int
    per_class: int = 300
    method: str = "DM"
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """In words."""
        sizes = f"3x{self.size}x{self.size}, {self.classes} classes, IPC {self.ipc}, real batch {self.real_batch}"
        return f"{self.method}, {sizes}, width {self.width}, {self.steps} steps"


SETTINGS = (
    Setting(size=16, classes=10, ipc=10, real_batch=64, width=64, steps=60),
    Setting(size=32, classes=10, ipc=10, real_batch=64, width=128, steps=25),
    Setting(size=32, classes=10, ipc=50, real_batch=128, width=128, steps=12),
    Setting(size=32, classes=20, ipc=10, real_batch=64, width=128, steps=12),
    Setting(size=64, classes=5, ipc=10, real_batch=32, width=128, steps=10),
    Setting(size=64, classes=5, ipc=100, real_batch=32, width=64, steps=6),
    *(
        Setting(size=32, classes=10, ipc=10, real_batch=64, width=64, steps=20, method=name, more=more)
        for name, more in {
            "DataDAM": {},
            "DC": {"outer_loop": 2, "inner_epochs": 5},
            "DSA": {"outer_loop": 2, "inner_epochs": 5},
            "IDC": {"inner_steps": 5, "trained_on": 256},
            "NCFM": {"networks": 2, "pretraining": TrainingRecipe(epochs=2), "frequencies": 512},
            "FYI+DM": {},
        }.items()
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", choices=("estimate", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return
    started = commit()
    cases = []
    for index, setting in enumerate(SETTINGS):
        said, took = (in_a_process(options, index, worker) for worker in ("estimate", "run"))
        cases.append(
            {
                "label": setting.label,
                "settings": {**vars(setting), "more": to_dict(setting.more)},
                "chunk": said["chunk"],
                **{
                    f"{name}_{kind}": figures[name]
                    for name in ("memory", "seconds", "disk")
                    for kind, figures in (("estimated", said), ("measured", took))
                },
            }
        )
        print(json.dumps(cases[-1]), flush=True)
    content = {"kind": "estimate", "title": "every method on generated images", "cases": cases}
    target = options.out or RESULTS / f"estimates-{torch.device(options.device).type}.json"
    write_result(target, content, seed=options.seed, started=started, device=options.device)


def in_a_process(options: argparse.Namespace, index: int, worker: str) -> dict[str, float]:
    """The figures of one worker."""
    command = [sys.executable, "-m", "benchmarks.estimates", "--worker", worker, "--setting", str(index)]
    command += ["--device", options.device, "--seed", str(options.seed)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def work(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: the estimate, or what the run itself takes."""
    setting = SETTINGS[options.setting]
    source = make_source(setting, options.seed)
    method = dd.create_method(
        setting.method,
        ipc=setting.ipc,
        iterations=setting.steps,
        real_batch=setting.real_batch,
        network=dd.networks.NetworkSpec(width=setting.width),
        **setting.more,
    )
    if options.worker == "estimate":
        cost = dd.estimate(method, source, seed=options.seed, device=options.device)
        return {"memory": cost.memory, "seconds": cost.seconds, "disk": cost.disk, "chunk": cost.chunk}
    with tempfile.TemporaryDirectory() as folder:
        out, largest = Path(folder) / "run", 0

        def look(_: object) -> None:
            nonlocal largest
            largest = max(largest, on_disk(out))

        begin = time.perf_counter()
        dd.synthesize(
            method,
            source,
            seed=options.seed,
            device=options.device,
            out=out,
            checkpoint_every=max(1, method.steps // 4),
            progress=False,
            callback=look,
        )
        seconds = time.perf_counter() - begin
        largest = max(largest, on_disk(out))
    return {"memory": peak_memory(torch.device(options.device)), "seconds": seconds, "disk": largest}


def make_source(setting: Setting, seed: int) -> ImageSource:
    """Random images."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(setting.classes).repeat_interleave(setting.per_class)
    shape = (len(targets), 3, setting.size, setting.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageSource("random images", [f"class {c}" for c in range(setting.classes)], images, targets)


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
