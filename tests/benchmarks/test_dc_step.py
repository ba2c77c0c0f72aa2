import importlib
from argparse import Namespace
from pathlib import Path

import torch


def test_an_outer_iteration_equals_the_plain_loop(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    dc_step = importlib.import_module("benchmarks.speed.dc_step")
    sizes = {"ipc": 2, "classes": 2, "per_class": 5, "real_batch": 3, "outer_loop": 2, "inner_epochs": 1}
    found = dc_step.check(Namespace(seed=0, device="cpu", **sizes), torch.float64)
    assert [one.quantity for one in found][-1] == "images after all updates"
    assert all(one.relative < 1e-9 for one in found)
