"""Teachers at work on a set: one epoch of labels at a time."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from dsdistill.core.device import (
    is_out_of_memory,
    release_memory,
    resolve_device,
    settle_allocator,
    synchronize,
)
from dsdistill.core.units import shown_duration, shown_size
from dsdistill.errors import BadData, DistillError, OutOfMemory
from dsdistill.experts import Committee
from dsdistill.relabelling.distances import class_distances
from dsdistill.relabelling.heading import KEPT, LABEL, RECORD, Heading, record_digest
from dsdistill.relabelling.labelset import stream
from dsdistill.relabelling.plan import Asked, planned
from dsdistill.relabelling.record import EpochRecord
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
T = TypeVar("T")


class Labeller:
    """Teachers at work on one set.

    Args:
        heading: what is asked of them.
        synthetic: the set.
        committee: the teachers.
        device: where they work.
    """

    def __init__(
        self, heading: Heading, synthetic: SyntheticDataset, committee: Committee, device: torch.device
    ) -> None:
        self.heading, self.committee, self.device = heading, committee, device
        self.chunk = int(heading.execution["chunk"])  # images that pass at a time
        for teacher in committee:
            teacher.network.to(device)
        self._images = synthetic.tensors()[0].to(device)
        self._classes = torch.tensor(synthetic.targets, device=device)
        self._weights = torch.tensor(heading.weights)

    @classmethod
    def of(
        cls,
        synthetic: SyntheticDataset,
        committee: Committee,
        asked: Asked,
        device: str | torch.device | None,
        chunk: int | None,
    ) -> "Labeller":
        """After every check that needs no work; errors as in `relabel`."""
        resolved = resolve_device(device)
        heading = planned(synthetic, committee, asked, resolved, chunk)
        settle_allocator(resolved)
        return cls(heading, synthetic, committee, resolved)

    def tell(self, files: int, needed: int) -> None:
        """Log what so many files will cost."""
        logger.info(
            "%s labels by %s: %s, about %s",
            self.heading.kind,
            ", ".join(teacher.name for teacher in self.committee),
            shown_size(needed),
            shown_duration(self.seconds() * files),
        )

    def seconds(self) -> float:
        """Time that one file takes, by two of its steps: the first warms up. Errors as in `made`."""
        return self._guarded(self._estimated)

    def made(self, number: int) -> dict[str, Tensor]:
        """The tensors of file ``number``, on the CPU; after running out of memory, with half the chunk.

        Raises:
            OutOfMemory: with one mini-batch at a time. BadData: a teacher's logits are not finite.
        """
        return self._guarded(lambda: self._static() if self.heading.recipe is None else self._epoch(number))

    def _guarded(self, work: Callable[[], T]) -> T:
        """Work that is begun again with half the chunk where memory runs out."""
        least = 1 if self.heading.recipe is None else self.heading.recipe.batch_size
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, DistillError) or not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold tensors
            passing = min(self.chunk, self.heading.count)
            if passing <= least:
                knobs = "Take fewer teachers, a smaller batch_size, or a device with more memory."
                raise OutOfMemory("labelling", passing, str(failure), knobs) from failure
            self.chunk = max(least, passing // 2)
            release_memory(self.device)
            logger.warning("memory ran out: %d images pass at a time from now on (%s)", self.chunk, failure)

    def _estimated(self) -> float:
        if self.heading.recipe is None:
            took = self._timed(lambda: self._ask(self._images[: self.chunk], 1))
            return took * -(-self.heading.count // self.chunk)
        record = self._drawn(0)
        group = next(iter(self._groups(record)))
        return self._timed(lambda: self._labels(record, group)) * -(-len(record) // len(group))

    def _timed(self, work: Callable[[], object]) -> float:
        for _ in range(2):
            synchronize(self.device)
            begin = time.perf_counter()
            work()
            synchronize(self.device)
        return time.perf_counter() - begin

    def _static(self) -> dict[str, Tensor]:
        encoded = [
            self._encoded(self._ask(part, 1), self._classes[:0])[0] for part in torch.split(self._images, self.chunk)
        ]
        return _joined(encoded, LABEL)

    def _epoch(self, number: int) -> dict[str, Tensor]:
        record, encoded, kept = self._drawn(number), [], []
        for group in self._groups(record):
            stored, keeps = self._labels(record, group)
            encoded.append(stored)
            kept.append(keeps)
        tensors = record.tensors()
        if self.heading.records == "drawn":
            tensors = {"digest": record_digest(tensors)}
        made = {**{f"{RECORD}{name}": tensor for name, tensor in tensors.items()}, **_joined(encoded, LABEL)}
        return made if self.heading.calibration is None else {**made, KEPT: torch.cat(kept)}

    def _drawn(self, number: int) -> EpochRecord:
        heading, recipe = self.heading, self.heading.recipe
        assert recipe is not None
        return EpochRecord.draw(recipe, heading.count, heading.shape, stream(heading.seed), number)

    def _groups(self, record: EpochRecord) -> Iterator[range]:
        """Numbers of mini-batches that pass together: as many as fit the chunk; a ragged last one passes alone."""
        size, parts = record.recipe.batch_size, record.recipe.sub_batches
        together = max(1, self.chunk // size)
        if self.heading.teacher_mode == "batch" and size % parts:
            together = 1  # the parts of several such mini-batches would not be those of each
        whole = len(record.order) // size
        for first in range(0, whole, together):
            yield range(first, min(first + together, whole))
        if whole < len(record):
            yield range(whole, whole + 1)

    def _labels(self, record: EpochRecord, group: range) -> tuple[dict[str, Tensor], Tensor]:
        """Encoded labels of some mini-batches, and which views are kept."""
        shown = record.shown_together(self._images, group)
        logits = self._ask(shown, record.recipe.sub_batches * len(group))
        pairs = [record.pairs(number, self._classes) for number in group]
        own, partner = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if self.heading.kind == "distances":
            logits = class_distances(logits, own, partner)
        return self._encoded(logits, own)

    def _ask(self, images: Tensor, parts: int) -> Tensor:
        by_batch = self.heading.teacher_mode == "batch"
        logits = self.committee.logits(images, self._weights, batch_statistics=by_batch, parts=parts)
        if not bool(torch.isfinite(logits).all()):
            raise BadData("a teacher's logits are not finite: look at its weights, and at the pixels of the set")
        return logits

    def _encoded(self, labels: Tensor, own: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        kept = torch.ones(len(labels), dtype=torch.bool)
        if self.heading.calibration is not None:
            labels, keeps = self.heading.calibration.calibrated(labels, own)
            kept = keeps.cpu()
        return {name: tensor.cpu() for name, tensor in self.heading.codec.encode(labels).items()}, kept


def _joined(parts: list[dict[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.cat([part[name] for part in parts]) for name in parts[0]}
