"""Replays, as far as they can be seen without a CUDA device; the rest is in ``tests/gpu/test_replay.py``."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsdistill.core import replay
from dsdistill.core.replay import WARM, Rate, Replayed, compiled, forget_gradients, replayable
from dsdistill.experts.progress import Progress

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_elsewhere_the_function_is_called_each_time():
    asked = []
    replayed = Replayed(lambda one: asked.append(one) or 2 * one, CPU)
    for number in range(WARM + 3):
        assert float(replayed(torch.tensor(float(number)))) == 2 * number
    replayed(torch.ones(3))  # other shapes are nothing special
    assert len(asked) == WARM + 4


class FakeGraph:
    """Works out the recorded function anew, on the inputs that were there when it was recorded."""

    def __init__(self, function):
        self.function, self.replays = function, 0

    def replay(self):
        self.replays += 1
        self.output.copy_(self.function())


@pytest.fixture
def device(monkeypatch):
    """A CUDA device of which only the calls are real."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(replay, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return CUDA


def test_a_function_is_recorded_once_and_its_inputs_are_copied(device, monkeypatch):
    made, graphs = [], []

    def function(one, other):
        made.append((one, other))
        return one + 2 * other

    replayed = Replayed(function, device)

    def graph():
        graphs.append(FakeGraph(lambda: function(*replayed._inputs)))
        return graphs[-1]

    @contextlib.contextmanager
    def recording(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads may go on with what they do
        yield
        graph.output = replayed._output

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    results = []
    for number in range(WARM + 4):
        one, other = torch.tensor([float(number)]), torch.tensor([10.0 * number])
        results.append(replayed(one, other))
    assert [float(one) for one in results] == [21.0 * number for number in range(WARM + 4)]  # none is overwritten
    assert len(graphs) == 1
    assert graphs[0].replays == 4
    assert len({id(one) for one, _ in made[WARM:]}) == 1  # the same memory each time
    with pytest.raises(ValueError, match="recorded for"):
        replayed(torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match="recorded for"):
        replayed(torch.ones(1).double(), torch.ones(1))


def test_few_calls_are_not_recorded(device):
    replayed = Replayed(lambda one: 2 * one, device, calls=2 * WARM)
    for _ in range(2 * WARM):
        replayed(torch.ones(1))
    assert replayed._graph is None
    assert not replayed.recorded
    assert Replayed(len, device, calls=2 * WARM + 1).recorded
    assert not Replayed(len, CPU).recorded


def test_memory_that_runs_out_in_a_recording_is_told_as_such(device, monkeypatch):
    """The library ends the recording first, which fails, and leaves its own stream behind."""
    left = []

    @contextlib.contextmanager
    def recording(graph, stream, capture_error_mode):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def function(one):
        if replayed._calls > WARM:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return one

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "set_stream", left.append)
    replayed = Replayed(function, device)
    for _ in range(WARM):
        replayed(torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        replayed(torch.ones(1))
    assert left == [torch.cuda.current_stream(device)]


def test_all_functions_share_a_stream(device):
    first, second = (Replayed(lambda one: one, device) for _ in range(2))
    first(torch.ones(1))
    second(torch.ones(1))
    assert len(replay._streams) == 1
    assert first._stream is second._stream


def test_what_is_compiled(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: ("compiled", function, dynamic))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(replay, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(replay.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "gcc")
    (tmp_path / "Python.h").touch()
    worth, capability = replay.WORTH_COMPILING, (9, 0)
    assert compiled(len, CPU, worth) is len
    assert compiled(len, CUDA, worth - 1) is len
    assert compiled(len, CUDA, worth, 60.0) is len
    assert not caplog.records
    assert compiled(len, CUDA, worth) == compiled(len, CUDA, worth, 90.0) == ("compiled", len, False)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(replay.shutil, "which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    assert compiled(len, CUDA, worth) is len
    assert "needs a C compiler" in caplog.text
    monkeypatch.setattr(replay.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compiled(len, CUDA, worth) != len
    (tmp_path / "Python.h").unlink()
    assert compiled(len, CUDA, worth) is len
    assert f"needs Python's headers ({tmp_path / 'Python.h'})" in caplog.text
    monkeypatch.setattr(replay, "find_spec", lambda name: None)
    assert compiled(len, CUDA, worth) is len
    assert "needs triton" in caplog.text
    capability = (6, 1)
    assert compiled(len, CUDA, worth) is len
    assert "compute capability" in caplog.text


def test_the_step_size_is_that_of_the_next_step():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0, **replayable(CPU))
    rate = Rate(optimizer, CPU)
    weight.sum().backward()
    for size, expected in ((0.25, 0.75), (0.5, 0.25)):
        rate.set(size)
        optimizer.step()
        assert weight.item() == expected


def test_gradients_are_forgotten():
    model = nn.Linear(2, 1)
    model(torch.ones(2)).sum().backward()
    forget_gradients(model)
    assert all(one.grad is None for one in model.parameters())


def test_a_training_goes_on_with_the_settings_of_its_own_optimizer(tmp_path):
    """A device may have others than the one that it began on; moments and counts are those that were kept."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    kept = Progress(tmp_path, model, optimizer)
    kept.add(1)
    kept.write()
    other = torch.optim.Adam(model.parameters(), lr=0.25, foreach=True)
    assert Progress(tmp_path, model, other).read() == 1
    (group,) = other.param_groups
    assert (group["lr"], group["foreach"]) == (0.25, True)
    for parameter in model.parameters():
        assert float(other.state[parameter]["step"]) == 1
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
