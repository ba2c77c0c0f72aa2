"""The loop around every method: devices, seeds, checkpoints, signals, progress, files."""

from dsdistill.engine.rehearsal import Estimate, estimate
from dsdistill.engine.run import synthesize
from dsdistill.engine.synthesizer import Job, Metrics, PerClass, Run, State, Synthesizer

__all__ = ["Estimate", "Job", "Metrics", "PerClass", "Run", "State", "Synthesizer", "estimate", "synthesize"]
