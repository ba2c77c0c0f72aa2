"""Training the experts that are missing: in which order, how many at once, and what is kept when."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsdistill.core.units import shown_duration, shown_size
from dsdistill.engine import Run
from dsdistill.errors import OutOfSpace
from dsdistill.experts.shards import Expert, file_bytes
from dsdistill.experts.shelf import FolderShelf, Shelf
from dsdistill.experts.trainer import TIMED, WARM_UP, Pace, Trainer

logger = logging.getLogger("dsdistill")
_KEEP_SECONDS = 60.0  # between two writes of an expert that is being trained
_TOGETHER = 8  # experts that fill a GPU; on a CPU, one does


@dataclass
class Growth:
    """Brings experts on a shelf to so many epochs.

    Args:
        run: that waits for them.
        trainer: makes them.
        shelf: has what there is of them, and keeps what is made.
        epochs: after which they are done.
        together: as in `Experts`.
    """

    run: Run
    trainer: Trainer
    shelf: Shelf
    epochs: int
    together: int | None

    def train(self, missing: Sequence[int]) -> None:
        """Train experts, keeping them as they grow."""
        if not missing:
            return
        groups = self._groups(missing)
        needed, steps = self._bytes(missing), self._steps(groups)
        self.shelf.require_space(needed + self._bytes_of_one(missing))  # one is written beside the file it replaces
        logger.info(
            "%d experts are to be trained on the real images up to epoch %d (%s): %s more in %s",
            len(missing),
            self.epochs,
            type(self.trainer.training).__name__,
            shown_size(needed),
            self.shelf.place,
        )
        pace = Pace(
            self.run.device,
            lambda seconds: logger.info("experts take about %s", shown_duration(seconds * steps)),
        )
        done = 0
        for group in groups:
            self._grow([self._member(index) for index in group], pace)
            done += len(group)
            logger.info("trained: %d of %d", done, len(missing))

    def _grow(self, members: Sequence[Expert], pace: Pace) -> None:
        def keep() -> None:
            for expert in members:
                if expert.epochs > max(0, expert.kept):
                    self.shelf.keep(expert)

        written = time.monotonic()
        try:
            self.run.shared.give_way()
            while members[0].epochs < self.epochs:
                self.trainer.epoch(members, pace)
                if time.monotonic() - written > _KEEP_SECONDS and members[0].epochs < self.epochs:
                    keep()
                    written = time.monotonic()
                self.run.shared.give_way()
        except OutOfSpace:
            raise
        except BaseException:  # a request to stop, an interrupt: what was made shall not be lost
            keep()
            raise
        keep()

    def rehearse(self, missing: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Make a few steps, count the others; where an expert starts, and how far it goes in an epoch, (P,) each."""
        rehearsal = self.run.shared.rehearsal
        assert rehearsal is not None
        groups = self._groups(missing)
        members, pace = [self.trainer.fresh(index) for index in groups[0]], Pace(self.run.device)
        wanted = min(WARM_UP + TIMED, self.epochs * self.trainer.steps_per_epoch)
        while pace.steps < wanted:
            self.trainer.epoch(members, pace, limit=wanted - pace.steps)
        if pace.seconds is not None:
            rehearsal.seconds += pace.seconds * max(0, self._steps(groups) - pace.steps)
        rehearsal.stored += self._bytes(missing) if isinstance(self.shelf, FolderShelf) else 0
        start = members[0].rows[0].float()
        return start, members[0].theta - start

    def _groups(self, missing: Sequence[int]) -> list[list[int]]:
        """Experts that are trained at once: as many as fit, of equal epochs."""
        size = self.together or (1 if self.run.device.type != "cuda" else _TOGETHER)
        groups: list[list[int]] = []
        for done in sorted({self._reached(index) for index in missing}, reverse=True):
            equal = [index for index in missing if self._reached(index) == done]
            groups += [equal[begin : begin + size] for begin in range(0, len(equal), size)]
        return groups

    def _steps(self, groups: Sequence[Sequence[int]]) -> int:
        return sum(self.epochs - self._reached(group[0]) for group in groups) * self.trainer.steps_per_epoch

    def _bytes(self, missing: Sequence[int]) -> int:
        return len(missing) * self._bytes_of_one(missing) - sum(map(self.shelf.nbytes, missing))

    def _bytes_of_one(self, missing: Sequence[int]) -> int:
        return file_bytes(self.trainer.fresh(missing[0]), self.epochs)

    def _reached(self, index: int) -> int:
        return self.shelf.reached(index) or 0

    def _member(self, index: int) -> Expert:
        return self.trainer.fresh(index) if self.shelf.reached(index) is None else self.shelf.load(index)
