"""What a run will cost, learned from a rehearsal of its first steps on this very machine."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsdistill.core import storage
from dsdistill.core.device import free_memory, peak_memory
from dsdistill.core.units import shown_duration, shown_size
from dsdistill.data import ImageSource
from dsdistill.engine import checkpoint
from dsdistill.engine.run import Execution, prepared_run
from dsdistill.engine.shared import Rehearsal, Shared
from dsdistill.engine.synthesizer import Synthesizer

_SECONDS = 3.0  # a rehearsal that takes less than this makes more steps, so that its clock means something
_LINE = 120  # bytes of metrics per step, about


@dataclass(frozen=True)
class Estimate:
    """Cost of a run.

    ``seconds`` of all steps; ``memory`` is the peak in bytes, of the process (its data and libraries included) on the
    CPU and of what torch allocates on a GPU; ``disk`` is the most the output folder will hold at a time, in bytes,
    and ``store`` what the run will add to the store of trained networks; ``chunk`` images pass the network at a time.
    ``free_memory`` and ``free_disk`` are what there is after the rehearsal (``free_disk`` None where no folder was
    named).
    """

    method: str
    device: str
    steps: int
    rehearsed: int
    chunk: int
    seconds: float
    memory: int
    free_memory: int
    disk: int
    free_disk: int | None
    store: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)

    def __str__(self) -> str:
        disk = f" of {shown_size(self.free_disk)} free" if self.free_disk is not None else ""
        store = [f"  store   {shown_size(self.store)} of trained networks, kept for other runs"] if self.store else []
        work = f"{self.steps} steps, judged by {self.rehearsed}" if self.steps else "without steps, judged by a trial"
        kind = "of the process" if self.device == "cpu" else "on the device"
        return "\n".join(
            (
                f"{self.method} on {self.device}, {work}:",
                f"  time    {shown_duration(self.seconds)}",
                f"  memory  {shown_size(self.memory)} at its peak {kind}; {shown_size(self.free_memory)} more are free",
                f"  disk    {shown_size(self.disk)}{disk}",
                *store,
                f"  chunk   {self.chunk} images at a time",
            )
        )


def estimate(
    method: Synthesizer,
    source: ImageSource,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    keep: int = 2,
    chunk: int | None = None,
    store: str | Path | None = None,
) -> Estimate:
    """Rehearse the first steps of a run, writing nothing, and say what the whole run will cost.

    The method's ``prepare`` is rehearsed too: networks are trained for a few steps only. Arguments, and errors raised
    before any work, as in `synthesize`.

    Raises:
        OutOfMemory: the run would not fit, whatever the chunk.
    """
    run = prepared_run(method, source, seed=seed, device=device, chunk=chunk, store=store)
    # Some ask their teachers what passes together; those shall not be trained in full for that.
    jobs = len(method.jobs(replace(run, shared=Shared(rehearsal=Rehearsal()))))
    execution = Execution(method, run, order=lambda jobs: jobs[:1])

    def rehearse(steps: int) -> tuple[float, int]:
        execution.limit, execution.rehearsal, begin = steps, Rehearsal(), time.perf_counter()
        made = execution()
        seconds = time.perf_counter() - begin
        return seconds, sum(map(len, made.files().values()))

    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    cold, _ = rehearse(min(1, method.steps))  # what comes first is slow: libraries are loaded, memory is found
    first, files = rehearse(min(1, method.steps))
    left_out = execution.rehearsal or Rehearsal()
    more = min(method.steps, 1 + max(2, min(20, int(_SECONDS / first))))
    step = (rehearse(more)[0] - first) / (more - 1) if more > 1 else 0.0
    return Estimate(
        method=method.title,
        device=run.device.type,
        steps=method.steps * jobs,
        rehearsed=more,
        chunk=execution.run.chunk,
        seconds=left_out.seconds + max(0.0, cold - first) + jobs * (first + max(step, 0.0) * max(0, method.steps - 1)),
        memory=peak_memory(run.device),
        free_memory=free_memory(run.device),
        disk=left_out.disk + checkpoint.nbytes(execution.state) * (keep + 1) + jobs * (files + _LINE * method.steps),
        free_disk=storage.free_space(Path(out)) if out is not None else None,
        store=left_out.stored,
    )
