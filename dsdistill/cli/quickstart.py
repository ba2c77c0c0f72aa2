"""The first minute with the package: digits in, a scored synthetic set out."""

from dataclasses import replace
from pathlib import Path

import dsdistill as dd
from dsdistill.evaluation import EvaluationResult, get_protocol
from dsdistill.networks import NetworkSpec

# Chosen so that everything takes well under a minute on two cores.
ITERATIONS = 300
EPOCHS = {"epochs": 150, "whole_epochs": 16}
REPEATS = 10


def quickstart(out: Path, *, seed: int = 0, device: str | None = None, overwrite: bool = False) -> EvaluationResult:
    """Distil scikit-learn's digits (8x8, bundled, nothing is downloaded) with DM and score the set.

    Leaves the set, its card, ``grid.png`` and ``results.json`` in ``out``.

    Raises:
        OutputConflict: ``out`` holds something else.
    """
    source = dd.data.load("digits")
    network = NetworkSpec("convnet", width=64, depth=2)
    method = dd.methods.DM(ipc=1, iterations=ITERATIONS, real_batch=64, network=network)
    synthetic = dd.synthesize(method, source, seed=seed, device=device, out=out, overwrite=overwrite)
    protocol = replace(get_protocol("dm"), epochs=EPOCHS["epochs"], network=network)
    result = dd.evaluate(
        synthetic,
        source,
        protocol=protocol,
        repeats=REPEATS,
        baselines=("random", "whole"),
        whole_epochs=EPOCHS["whole_epochs"],
        seed=seed,
        device=device,
    )
    result.save(out / "results.json", overwrite=True)
    return result
