"""Every exception this package raises on purpose.

::

    DistillError                       exit code 1
    ├── InvalidSetting (ValueError)    2   a setting has the wrong type or is out of range
    ├── UnknownName (LookupError)      2   a registry has no such entry
    ├── OutputConflict (OSError)       2   the output folder holds another run, or cannot be written
    ├── DeviceUnavailable (RuntimeError) 2 the device asked for is not there
    ├── MissingExtra (ImportError)     2   an optional package is not installed
    ├── BadData (ValueError)           3   missing, empty, corrupt or unsuitable input data
    │   └── ShapeMismatch              3   a tensor or image has the wrong shape
    ├── MissingWeights (OSError)       3   a pretrained model is not where it should be, or not whole
    ├── Diverged (ArithmeticError)     4   a loss or a state tensor became NaN or infinite
    ├── OutputLocked (OSError)         5   another process works in the output folder
    ├── OutOfSpace (OSError)           5   the disk cannot hold what is about to be written
    ├── OutOfMemory                    5   memory ran out, also with the smallest chunk
    ├── BadArtifact (ValueError)       6   a set or checkpoint is corrupt, foreign, newer or unsafe
    └── Stopped                  130/143   a signal ended the run after its state was saved

Each message says what was given, where, and what to do; the facts are attributes. The command line
turns an exception into its ``exit_code``.
"""

import difflib
import signal as _signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar


class DistillError(Exception):
    """Base class of all errors of this package."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between processes; their constructors take facts, not the message.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[DistillError], arguments: tuple[Any, ...], facts: dict[str, Any]) -> DistillError:
    error = cls.__new__(cls, *arguments)
    error.args = arguments
    error.__dict__.update(facts)
    return error


class InvalidSetting(DistillError, ValueError):
    """A setting has the wrong type or lies outside its range.

    Attributes: ``setting`` (its name), ``value`` (what was given), ``allowed`` (what would do).
    """

    exit_code = 2

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        self.setting, self.value, self.allowed = setting, value, allowed
        super().__init__(f"{setting} = {value!r} is not valid: {allowed}")


class UnknownName(DistillError, LookupError):
    """A registry or class has no such entry.

    Attributes: ``kind`` ("method", "dataset", ...), ``name``, ``known`` (all valid names).
    """

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        folded = {candidate.lower(): candidate for candidate in self.known}
        near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
        guess = f"; did you mean {folded[near[0]]!r}?" if near else "."
        listing = ", ".join(self.known) if self.known else "none"
        super().__init__(f"unknown {kind} {name!r}{guess} Known: {listing}.{' ' + hint if hint else ''}")


class OutputConflict(DistillError, OSError):
    """The output folder holds something else, or cannot be written. Attribute: ``path``."""

    exit_code = 2

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class OutputLocked(DistillError, OSError):
    """Another live process works in the output folder. Attributes: ``path``, ``holder``."""

    exit_code = 5

    def __init__(self, path: Path, holder: str) -> None:
        self.path, self.holder = path, holder
        super().__init__(f"{path}: in use by {holder}; wait for it to end or choose another output folder")


class OutOfSpace(DistillError, OSError):
    """The disk cannot hold what is about to be written. Attributes: ``path``, ``needed``, ``free`` (bytes)."""

    exit_code = 5

    def __init__(self, path: Path, needed: int, free: int) -> None:
        self.path, self.needed, self.free = path, needed, free
        super().__init__(
            f"{path}: {needed} bytes are needed and {free} are free; "
            "free space or choose another folder (caches: DSDISTILL_CACHE)"
        )


class OutOfMemory(DistillError):
    """Memory ran out, and smaller chunks did not help. Attributes: ``what`` (was being done), ``chunk`` (the last)."""

    exit_code = 5

    def __init__(self, what: str, chunk: int, problem: str, knobs: str) -> None:
        self.what, self.chunk = what, chunk
        super().__init__(f"{what}: out of memory with {chunk} images at a time ({problem}). {knobs}")


class DeviceUnavailable(DistillError, RuntimeError):
    """The device asked for does not exist here. Attribute: ``device``."""

    exit_code = 2

    def __init__(self, device: str, problem: str) -> None:
        self.device = device
        super().__init__(f"device {device!r}: {problem}; use device='cpu' or leave it out to pick the best one")


class MissingExtra(DistillError, ImportError):
    """An optional dependency is absent. Attributes: ``package``, ``extra``."""

    exit_code = 2

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'dsdistill[{extra}]'")


class BadData(DistillError, ValueError):
    """Input data is missing, empty, corrupt or does not fit the task."""

    exit_code = 3


class ShapeMismatch(BadData):
    """A tensor or image has the wrong shape. Attributes: ``actual``, ``expected``."""

    def __init__(self, what: str, actual: tuple[int, ...], expected: str) -> None:
        self.actual, self.expected = actual, expected
        super().__init__(f"{what} has shape {actual}, expected {expected}")


class MissingWeights(DistillError, OSError):
    """A pretrained model is not there, not whole, or of another make; random weights are never taken in its place.

    Attributes: ``what`` (the model), ``tried`` (where), ``expected`` (the files), ``allowed`` (whether it may be
    fetched, or what else would do).
    """

    exit_code = 3

    def __init__(self, what: str, tried: str, expected: str, allowed: str) -> None:
        self.what, self.tried, self.expected, self.allowed = what, tried, expected, allowed
        super().__init__(f"{what} cannot be had from {tried}: {expected}; {allowed}")


class Diverged(DistillError, ArithmeticError):
    """The loss or a state tensor stopped being finite.

    Attributes: ``method``, ``job``, ``iteration`` (the first bad one), ``metrics`` (of the last good
    one), ``last_good`` (the synthetic set of the state before it, where there is one), ``saved`` (its folder, or
    None when the run has no output folder).
    """

    exit_code = 4

    def __init__(
        self,
        method: str,
        job: str,
        iteration: int,
        culprit: str,
        *,
        metrics: Mapping[str, float] | None = None,
        last_good: object = None,
        saved: Path | None = None,
        lower: str = "the learning rate",
    ) -> None:
        self.method, self.job, self.iteration = method, job, iteration
        self.metrics, self.last_good, self.saved = dict(metrics or {}), last_good, saved
        good = f" Last good metrics: {self.metrics}." if self.metrics else ""
        kept = f" The last good state is saved in {saved}." if saved else ""
        super().__init__(
            f"{method}, job {job!r}, iteration {iteration}: {culprit} is not finite.{good}{kept} Lower {lower}."
        )


class BadArtifact(DistillError, ValueError):
    """A saved set or checkpoint is corrupt, foreign, from a newer version or unsafe. Attribute: ``path``."""

    exit_code = 6

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class Stopped(DistillError):
    """A signal ended the run after the step in progress; its state is saved.

    Attributes: ``signum``, ``iteration``, ``path`` (the output folder), ``kept`` (what was made before the first
    iteration, and where it is kept; empty where nothing was).
    """

    def __init__(self, signum: int, iteration: int, path: Path, kept: str = "") -> None:
        self.signum, self.iteration, self.path, self.kept = signum, iteration, path, kept
        super().__init__(
            f"stopped by {_signal.Signals(signum).name} after "
            f"{kept or f'{iteration} iterations; state saved in {path}'}. "
            "Run the same command again to continue."
        )

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """By shell convention, 128 + signal number."""
        return 128 + self.signum
