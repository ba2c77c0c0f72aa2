"""The one place that turns a device argument into a `torch.device`."""

import gc

import torch
from torch import Tensor

from dsdistill.errors import DeviceUnavailable


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Check a device before any work starts.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", a `torch.device`, or None for the best one present.

    Raises:
        DeviceUnavailable: the name is no device, or the device is not there.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceUnavailable(str(device), "no such kind of device (cpu, cuda, cuda:N, mps)") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise DeviceUnavailable(str(device), f"this machine offers {count} CUDA devices to torch")
        return torch.device("cuda", resolved.index if resolved.index is not None else torch.cuda.current_device())
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailable(str(device), "torch finds no Apple GPU")
    if resolved.type not in ("cpu", "mps"):
        raise DeviceUnavailable(str(device), "only cpu, cuda and mps are supported")
    return resolved


def default_chunk(shape: tuple[int, int, int], device: torch.device) -> int:
    """How many images (C, H, W) should pass a network at a time.

    On the CPU such that one 128-channel activation stays within 16 MiB: it then nearly fits the caches and is small
    enough for the C allocator to reuse. On accelerators within 2 GiB, and at most 4096 images.
    """
    activation = 128 * 4 * shape[1] * shape[2]
    budget = 16 * 2**20 if device.type == "cpu" else 2 * 2**30
    return max(1, min(budget // activation, 4096))


def in_parts(tensor: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Rows of ``tensor`` in as few parts of at most ``chunk`` as there can be, of nearly equal size.

    A small rest, which takes nearly as long as a whole part, is spread over the others.
    """
    return torch.tensor_split(tensor, max(1, -(-len(tensor) // chunk)))


def settle_allocator(device: torch.device) -> None:
    """Have glibc keep the memory of freed activations; about halves the time of small networks on the CPU.

    glibc returns a freed block to the system, to be page-faulted anew by the next operation, unless it is smaller
    than the largest block freed so far (up to 32 MiB). One such block, made and freed, settles that without changing
    any setting of the process. Elsewhere, and where memory is too short for it, this does nothing of note.
    """
    if device.type == "cpu":
        try:
            torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a CUDA device since its last reset, else the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device: torch has a class of its own for CUDA only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The last is oneDNN's word when it finds no room for its code and scratch; it never gives a reason.
    signs = ("out of memory", "not enough memory", "can't allocate memory", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on a CUDA device, else in the main memory as the system sees it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
