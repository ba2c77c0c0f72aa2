"""The contract every method keeps, as a suite that anybody can run on theirs.

>>> from dsdistill.methods import RandomReal
>>> len(check_synthesizer(RandomReal(ipc=2)))
9
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsdistill.core.config import from_dict, to_dict
from dsdistill.core.device import default_chunk
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run, Synthesizer, synthesize
from dsdistill.engine.observe import StepEvent
from dsdistill.engine.run import Execution
from dsdistill.synthetic import MANIFEST, SyntheticDataset

_FILES = ("images.safetensors", "labels.safetensors", MANIFEST)


class ContractViolation(AssertionError):
    """A method breaks the contract; the message says which check failed and how."""


def toy_source(
    classes: int = 3, per_class: int = 12, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0
) -> ImageSource:
    """Small random images whose classes differ in mean colour; its test split refuses to be opened."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(0, 128, (len(targets), *shape), generator=generator)
    images = (noise + 100 * targets[:, None, None, None] // max(1, classes - 1)).to(torch.uint8)
    names = [f"class {index}" for index in range(classes)]
    return ImageSource("toy", names, images, targets, open_test=_refuse_test)


def _refuse_test() -> ImageSource:
    raise ContractViolation("the method opened the test split")


def check_synthesizer(
    method: Synthesizer, source: ImageSource | None = None, *, device: str | torch.device = "cpu"
) -> list[str]:
    """Run the contract suite on a method; settings should be small enough for a second per run.

    Args:
        method: an instance with settings that suit a small source.
        source: real images; a toy source of 3 classes, 36 images 3x8x8 if None.
        device: where to run. Bit-for-bit checks are promised on the CPU.

    Returns:
        The names of the checks, all passed.

    Raises:
        ContractViolation: at the first check that fails.
    """
    source = toy_source() if source is None else source
    with tempfile.TemporaryDirectory() as store:
        return _checked(_Suite(method, source, torch.device(device), Path(store)))


def _checked(suite: "_Suite") -> list[str]:
    checks: list[Callable[[], None]] = [
        suite.settings_are_complete,
        suite.makes_a_set,
        suite.same_seed_same_bytes,
        suite.other_seed_other_bytes,
        suite.leaves_global_randomness_alone,
        suite.resumes_bit_for_bit,
        suite.independent_of_job_order,
        suite.survives_save_and_load,
        suite.states_its_bytes,
    ]
    for check in checks:
        check()
    return [check.__name__ for check in checks]


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ContractViolation(problem)


class _Suite:
    def __init__(self, method: Synthesizer, source: ImageSource, device: torch.device, store: Path) -> None:
        self.method, self.source, self.device, self.store = method, source, device, store
        self.name = type(method).__name__

    def _bytes(self, folder: Path) -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in _FILES}

    def _synthesize(self, **options: Any) -> SyntheticDataset:
        return synthesize(self.method, self.source, device=self.device, store=self.store, progress=False, **options)

    def _run(self, folder: Path, seed: int = 0) -> dict[str, bytes]:
        self._synthesize(seed=seed, out=folder)
        return self._bytes(folder)

    def settings_are_complete(self) -> None:
        """Frozen dataclass, full repr, JSON round trip, a paper."""
        method = self.method
        _require(
            "__dataclass_fields__" in vars(type(method)),
            f"{self.name} is no dataclass of its own",
        )
        _require(method.__dataclass_params__.frozen, f"{self.name} is not frozen")  # type: ignore[attr-defined]
        missing = [field.name for field in dataclasses.fields(method) if f"{field.name}=" not in repr(method)]
        _require(not missing, f"repr of {self.name} leaves out {missing}")
        _require(from_dict(type(method), to_dict(method)) == method, f"settings of {self.name} do not survive JSON")
        _require(bool(getattr(type(method), "paper", "")), f"{self.name} names no paper")

    def makes_a_set(self) -> None:
        """Finite images of the source's shape and classes."""
        made = self._synthesize()
        images, _ = made.tensors()
        _require(images.device.type == "cpu", "the set is not on the CPU")
        _require(bool(torch.isfinite(images).all()), "images are not finite")
        _require(made.classes == self.source.classes, "classes differ from the source's")
        _require(made.normalization == self.source.normalization, "normalization differs from the source's")
        _require(min(made.counts) >= 1, f"classes without images: counts {made.counts}")

    def same_seed_same_bytes(self) -> None:
        """Two runs, equal files."""
        with tempfile.TemporaryDirectory() as folder:
            first, second = (self._run(Path(folder) / name) for name in "ab")
        changed = [name for name in _FILES if first[name] != second[name]]
        _require(not changed, f"two runs with seed 0 differ in {changed}")

    def other_seed_other_bytes(self) -> None:
        """Another seed, other images."""
        with tempfile.TemporaryDirectory() as folder:
            first, second = (self._run(Path(folder) / str(seed), seed) for seed in (0, 1))
        name = "images.safetensors"
        _require(first[name] != second[name], "seeds 0 and 1 give the same images: the seed is not used")

    def leaves_global_randomness_alone(self) -> None:
        """The caller's global generator is where it was."""
        before = torch.get_rng_state()
        self._synthesize()
        _require(torch.equal(before, torch.get_rng_state()), "the caller's global random state changed")

    def resumes_bit_for_bit(self) -> None:
        """Stopped half-way, disturbed, run again: the files of an uninterrupted run."""
        if self.method.steps < 2:
            return
        stop_at = self.method.steps // 2

        def interrupt(event: StepEvent) -> None:
            if event.iteration >= stop_at:
                raise KeyboardInterrupt

        with tempfile.TemporaryDirectory() as folder:
            whole = self._run(Path(folder) / "whole")
            cut = Path(folder) / "cut"
            for callback in (interrupt, None):
                try:
                    self._synthesize(out=cut, checkpoint_every=max(1, stop_at - 1), callback=callback)
                except KeyboardInterrupt:
                    torch.rand(7)  # a resumed run must not depend on where the global generator stands
            resumed = self._bytes(cut)
        changed = [name for name in _FILES if whole[name] != resumed[name]]
        _require(not changed, f"a run stopped after step {stop_at} and resumed differs in {changed}")

    def independent_of_job_order(self) -> None:
        """Jobs run backwards give the same set (a method with a single job passes by having nothing to reorder)."""

        def run(order: Callable[[Sequence[Job]], Sequence[Job]]) -> SyntheticDataset:
            source = self.source.train_only().to(self.device)
            context = Run(
                source=source,
                device=self.device,
                rng=Rng(0, device=self.device),
                classes=tuple(range(source.num_classes)),
                chunk=default_chunk(source.shape, self.device),
                store=self.store,
            )
            return Execution(self.method, context, order=order)()

        forward, backward = run(lambda jobs: jobs), run(lambda jobs: list(reversed(jobs)))
        for one, other in zip(forward.tensors(), backward.tensors(), strict=True):
            _require(torch.equal(one, other), "the order of the jobs changes the result")

    def survives_save_and_load(self) -> None:
        """Loaded images and targets equal the saved ones."""
        made = self._synthesize()
        with tempfile.TemporaryDirectory() as folder:
            loaded = SyntheticDataset.load(made.save(Path(folder) / "set"))
        for one, other in zip(made.tensors(), loaded.tensors(), strict=True):
            _require(torch.equal(one, other), "a saved set decodes differently once loaded")
        _require(repr(made) == repr(loaded), "a saved set describes itself differently once loaded")

    def states_its_bytes(self) -> None:
        """`nbytes` is the size of the tensors in the files."""
        made = self._synthesize()
        for part, stated in ((made.images, made.nbytes.images), (made.labels, made.nbytes.labels)):
            actual = sum(tensor.numel() * tensor.element_size() for tensor in part.tensors().values())
            _require(stated == actual > 0, f"states {stated} bytes, stores {actual}")
