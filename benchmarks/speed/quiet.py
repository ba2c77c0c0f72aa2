"""Noticing that other programs use the processors, on Linux: where they do, a timing says little."""

import os
import resource
import time
from pathlib import Path
from types import TracebackType

_STAT = Path("/proc/stat")


class OtherLoad:
    """A context manager that measures the processor time of everything but this process and its ended children.

    After the context, ``cores`` is how many cores the others kept busy on average; 0 where that cannot be known.
    """

    cores = 0.0

    def __enter__(self) -> "OtherLoad":
        self._begin = (time.perf_counter(), _all_seconds(), _own_seconds())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall, everything, own = self._begin
        busy = (_all_seconds() - everything) - (_own_seconds() - own)
        self.cores = max(0.0, busy / (time.perf_counter() - wall))


def wait_for_quiet(limit: float, patience: float) -> None:
    """Sleep until the others use less than ``limit`` cores over 2 s, at most ``patience`` seconds."""
    end = time.perf_counter() + patience
    while time.perf_counter() < end:
        with OtherLoad() as others:
            time.sleep(2)
        if others.cores < limit:
            return


def _all_seconds() -> float:
    """Processor seconds of the whole machine, stolen ones included."""
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    if not _STAT.exists():
        return 0.0
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
