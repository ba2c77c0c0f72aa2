"""How a study stops: signals to it, and what it then asks of the cells at work, by a file in its folder.

A synthesis stops after its step with its state saved, which the engine does on a signal. Scoring is given up at once:
it starts again from the finished set.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dsdistill.engine.observe import StepEvent

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = "at once"
"""Content of the file when not even the step in progress shall be finished."""


class Halted(BaseException):
    """A request to stop took effect. Like KeyboardInterrupt no error, so that nobody handles it by mistake."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signum)


class Halting:
    """Requests to stop, received while a cell is at work; a context manager.

    Args:
        file: exists once the study wants its workers to stop; looked for after each step of a synthesis.
        patient: during a synthesis leave signals to the engine, however many there come: a worker of our own pool may
            get several for one request. Otherwise a second signal acts at once.
    """

    def __init__(self, file: Path, *, patient: bool = False) -> None:
        self.file, self.patient = file, patient
        self._asked: int | None = None
        self._synthesizing = False
        self._previous: dict[int, Any] = {}
        # Elsewhere no signal is received, and the engine does not listen to any.
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Halting":
        if self._main:
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def synthesis(self) -> Iterator[None]:
        """While the engine may be listening to signals itself."""
        self._synthesizing = True
        try:
            yield
        finally:
            self._synthesizing = False

    def check(self, event: StepEvent) -> None:
        """Pass a request on to the engine, which then stops after this step; called after each one."""
        signum = self._asked or (signal.SIGTERM if self.file.exists() else None)
        if signum is None:
            return
        if not self._main:
            raise Halted(signum)  # the last checkpoint is kept
        if signal.getsignal(signum) != self._receive:  # else the engine has heard it already, and is about to stop
            signal.raise_signal(signum)

    def settle(self) -> None:
        """Stop here if asked; between synthesis and scoring, where nothing is lost.

        Raises:
            Halted: the request.
        """
        if self._asked or self.file.exists():
            raise Halted(self._asked or signal.SIGTERM)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._asked = signum
        if not (self.patient and self._synthesizing):
            raise Halted(signum)


class Interruption:
    """The first SIGINT or SIGTERM asks all workers to stop, the second acts at once; a context manager.

    Only the main thread receives signals; elsewhere this does nothing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def note(self, signum: int) -> None:
        """A task was stopped by a signal: so is the study."""
        self.signum = self.signum or signum

    def now(self) -> None:
        """Tell our own workers to end without finishing their step."""
        self.file.write_text(AT_ONCE)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.file.touch()
        self._give_back()

    def _give_back(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
