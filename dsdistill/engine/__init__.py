"""The loop around every method: devices, seeds, checkpoints, signals, progress, files."""

from dsdistill.engine.rehearsal import Estimate, estimate
from dsdistill.engine.run import synthesize
from dsdistill.engine.shared import Rehearsal, Shared
from dsdistill.engine.synthesizer import Job, Metrics, PerClass, Preset, Run, State, Synthesizer, frozen, no_method

__all__ = [
    "Estimate",
    "Job",
    "Metrics",
    "PerClass",
    "Preset",
    "Rehearsal",
    "Run",
    "Shared",
    "State",
    "Synthesizer",
    "estimate",
    "frozen",
    "no_method",
    "synthesize",
]
