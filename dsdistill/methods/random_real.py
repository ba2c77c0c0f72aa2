"""Random real images: the baseline that no distilled set may fall below.

Draws ``ipc`` distinct images of each class uniformly. Every table needs this row.
"""

from dataclasses import dataclass
from typing import ClassVar

from dsdistill.engine import Job, PerClass, Run, State


@dataclass(frozen=True, kw_only=True)
class RandomReal(PerClass):
    """Uniform selection without replacement, class by class; nothing is learned."""

    paper: ClassVar[str] = "the baseline of every paper on dataset distillation"

    def start(self, run: Run, job: Job) -> State:
        return State(*self.random_real(run))
