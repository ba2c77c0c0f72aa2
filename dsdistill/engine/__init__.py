"""The loop around every method: devices, seeds, checkpoints, signals, progress, files."""

from dsdistill.engine.run import synthesize
from dsdistill.engine.synthesizer import Job, Metrics, PerClass, Run, State, Synthesizer

__all__ = ["Job", "Metrics", "PerClass", "Run", "State", "Synthesizer", "synthesize"]
