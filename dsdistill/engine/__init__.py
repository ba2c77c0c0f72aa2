"""The loop around every method: devices, seeds, checkpoints, signals, progress, files."""

from dsdistill.engine.run import synthesize
from dsdistill.engine.synthesizer import Job, Metrics, Run, State, Synthesizer, random_real

__all__ = ["Job", "Metrics", "Run", "State", "Synthesizer", "random_real", "synthesize"]
