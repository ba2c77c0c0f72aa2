"""Work that a CUDA device repeats without being asked for each kernel anew.

The kernels of a small network take a GPU less time than Python takes to ask for them. Recorded once as a CUDA graph,
they are one call: a training step of a transformer of eight layers took 48 ms on an H200, and 18 when it was replayed.
"""

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.core.device import is_out_of_memory

logger = logging.getLogger("dsdistill")
WARM = 2
"""Calls that are made as they are, before one is recorded: libraries and optimisers set themselves up in them."""
WORTH_COMPILING = 5000
"""Calls of a training step from which on half a minute of compilation is won back."""
_SECONDS = 90
"""And seconds, where a training ends after so long."""
_streams: dict[torch.device, Any] = {}  # one for each device: libraries keep tens of megabytes for every stream


class Replayed:
    """A function of tensors that on CUDA is recorded at its third call, and replayed from then on.

    On other devices it is called each time. The function may change parameters, buffers and moments in place, which
    must stay where they are in memory; it draws nothing at random, waits for nothing, and reads no tensor of the host:
    what changes from call to call is an argument, or a tensor on the device.

    Args:
        function: of tensors on ``device``, to a tensor.
        device: where it works.
        calls: how many there will be, if that is known: few are not worth a recording.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, calls: int | None = None) -> None:
        self.function, self.device = function, device
        self.recorded = device.type == "cuda" and (calls is None or calls > 2 * WARM)
        self._calls = 0
        self._stream: Any = None
        self._kinds: list[Any] = []
        self._graph: Any = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Its result for inputs of the shapes and types of the first call.

        Raises:
            ValueError: they have others.
        """
        if not self.recorded:
            return self.function(*inputs)
        self._calls += 1
        if self._calls == 1:
            if self.device not in _streams:
                _streams[self.device] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._stream = _streams[self.device]
            self._kinds = [(one.shape, one.dtype) for one in inputs]
        if [(one.shape, one.dtype) for one in inputs] != self._kinds:
            raise ValueError(f"recorded for {self._kinds}")
        if self._calls <= WARM:
            return self._aside(inputs)
        if self._graph is None:
            self._record(inputs)
        else:
            for kept, new in zip(self._inputs, inputs, strict=True):
                kept.copy_(new)
        self._graph.replay()
        assert self._output is not None
        return self._output.clone()  # the next replay overwrites it

    def _aside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """A call as it is, on the stream that is recorded later: what autograd keeps belongs to that stream."""
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self.function(*inputs)
        here.wait_stream(self._stream)
        return found

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(one.clone() for one in inputs)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._output = self.function(*self._inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # where the recording cannot be ended, the library leaves its own
            if error.__context__ is not None and is_out_of_memory(error.__context__):
                raise error.__context__ from None  # behind the complaint that the recording failed
            raise
        self._graph = graph


def compiled(
    function: Callable[..., Tensor], device: torch.device, calls: int, seconds: float | None = None
) -> Callable[..., Tensor]:
    """The function, fused by torch's compiler where that pays: on CUDA, for many calls of the same shapes.

    Args:
        calls: how many there will be, or fewer if they end after so many ``seconds``.
    """
    if device.type != "cuda" or calls < WORTH_COMPILING or (seconds is not None and seconds < _SECONDS):
        return function
    lacking = _lacking(device)
    if lacking:
        logger.warning("this training is not compiled, and takes about twice as long: that needs %s", lacking)
        return function
    result: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return result


def _lacking(device: torch.device) -> str:
    """What triton would need to compile for a device, in words."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "a GPU of compute capability 7.0"
    if find_spec("triton") is None:
        return "triton"
    if not (os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")):
        return "a C compiler (gcc, clang, or one named by CC)"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.exists() else f"Python's headers ({header})"


class Rate:
    """The step size of an optimiser, that may change from step to step though steps are replayed.

    Args:
        optimizer: whose groups all have it.
        device: of its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self._there = torch.zeros((), device=device) if device.type == "cuda" else None

    def set(self, value: float) -> None:
        """For the next step."""
        if self._there is not None:
            self._there.fill_(value)
        for group in self.optimizer.param_groups:
            group["lr"] = value if self._there is None else self._there


def replayable(device: torch.device) -> dict[str, Any]:
    """Options of Adam and AdamW whose steps are part of what is replayed."""
    return {"fused": True, "capturable": True} if device.type == "cuda" else {}


def forget_gradients(module: nn.Module) -> None:
    """Free the gradients of parameters, and with them the memory of a recorded step."""
    for parameter in module.parameters():
        parameter.grad = None
