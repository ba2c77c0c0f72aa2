"""Named random streams: every draw is a function of (seed, job, name, iteration).

No stream depends on how often another one was used, so a resumed run needs no generator state, jobs may
run in any order, and a test can ask for iteration 700 alone.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Rng:
    """Source of generators for one run (and, once scoped, one job of it).

    Example:
        >>> rng = Rng(seed=0)
        >>> a = torch.rand(2, generator=rng.at("real", 3))
        >>> b = torch.rand(2, generator=rng.at("real", 3))
        >>> bool((a == b).all())
        True
    """

    seed: int
    job: str = ""
    device: torch.device = torch.device("cpu")

    def scoped(self, job: str) -> "Rng":
        """The same run's streams for another job."""
        return replace(self, job=job)

    def within(self, name: str, iteration: int = 0) -> "Rng":
        """Streams of their own for a part of this job: the training of a network at ``iteration``, say."""
        return replace(self, job=f"{self.job}\x1e{name}\x1e{iteration}")

    def integer(self, name: str, iteration: int = 0) -> int:
        """A 63-bit seed for stream ``name`` at ``iteration``."""
        text = f"{self.seed}\x1f{self.job}\x1f{name}\x1f{iteration}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def at(self, name: str, iteration: int = 0, *, device: torch.device | str | None = None) -> torch.Generator:
        """A fresh generator, on the run's device unless another is named."""
        generator = torch.Generator(device=self.device if device is None else device)
        return generator.manual_seed(self.integer(name, iteration))


@contextmanager
def isolated_global_rng(device: torch.device) -> Iterator[None]:
    """Let code use the global generators, then give the caller's state back untouched.

    Library code that knows no generator argument (module initialisation, dropout) draws from the global
    generators; inside this context, `seed_global` may set them without the caller ever noticing.
    """
    kind = device.type if device.type in ("cuda", "mps") else "cuda"
    with torch.random.fork_rng(devices=[device] if device.type != "cpu" else [], device_type=kind):
        yield


def seed_global(value: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of ``device``. Only inside `isolated_global_rng`."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)
