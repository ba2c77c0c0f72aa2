"""Benchmarks of dsdistill; run from the repository root as ``python -m benchmarks.NAME``."""
