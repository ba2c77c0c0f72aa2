import pytest
import torch

from dsdistill.core import device as module
from dsdistill.core.device import default_chunk, in_parts, peak_memory, resolve_device, synchronize
from dsdistill.errors import DeviceUnavailable


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many CUDA devices and maybe an Apple GPU."""

    def machine(cuda=0, mps=False, current=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return machine


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({}, "cpu"),
        ({"mps": True}, "mps"),
        ({"cuda": 1}, "cuda:0"),
        ({"cuda": 2, "current": 1}, "cuda:1"),
        ({"cuda": 1, "mps": True}, "cuda:0"),
    ],
)
def test_none_means_the_best_present(options, best, machine):
    machine(**options)
    assert resolve_device(None) == torch.device(best)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("mps", "mps")],
)
def test_names_and_devices_are_taken_alike(given, resolved, machine):
    machine(cuda=2, mps=True, current=1)
    assert resolve_device(given) == resolve_device(torch.device(given)) == torch.device(resolved)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("cuda", {}, "device 'cuda': this machine offers 0 CUDA devices"),
        ("cuda:2", {"cuda": 2}, "device 'cuda:2': this machine offers 2 CUDA devices"),
        (torch.device("cuda:5"), {"cuda": 1}, "device 'cuda:5'"),
        ("mps", {}, "finds no Apple GPU"),
        ("meta", {"cuda": 1}, "only cpu, cuda and mps"),
        ("tpu", {}, "no such kind of device"),
        ("", {}, "no such kind of device"),
        ("cuda:x", {"cuda": 1}, "no such kind of device"),
        ("GPU", {"cuda": 1}, "no such kind of device"),
    ],
)
def test_what_is_not_there_is_refused(given, options, message, machine):
    machine(**options)
    with pytest.raises(DeviceUnavailable, match=message) as caught:
        resolve_device(given)
    assert caught.value.device == str(given)
    assert "use device='cpu' or leave it out" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_chunks_fill_16_mib_of_cache_or_2_gib():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_chunk((3, 32, 32), cpu) == 32  # 128 channels x 32 x 32 x 4 bytes = 512 KiB each
    assert default_chunk((1, 64, 32), cpu) == 16
    assert default_chunk((3, 8, 8), cpu) == 512
    assert default_chunk((3, 1, 1), cpu) == 4096
    assert default_chunk((3, 512, 512), cpu) == 1
    assert default_chunk((3, 32, 32), cuda) == 4096
    assert default_chunk((3, 256, 256), cuda) == 64


@pytest.mark.parametrize(("count", "sizes"), [(100, [25] * 4), (26, [26]), (27, [14, 13]), (1, [1]), (0, [0])])
def test_parts_are_few_and_of_nearly_equal_size(count, sizes):
    parts = in_parts(torch.arange(count), 26)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(count))


def test_peak_memory_is_in_bytes():
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    assert 2**24 < before < 2**40  # an interpreter with torch holds more than 16 MiB
    assert peak_memory(cpu) >= before


def test_peak_memory_on_cuda_is_what_torch_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123 if device.index == 1 else 0)
    assert peak_memory(torch.device("cuda:1")) == 123


def test_synchronize_waits_for_the_device_at_hand(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(module.torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        synchronize(torch.device(name))
    assert waited == [torch.device("cuda:1"), "mps"]
