"""An epoch of labels for any loop: a plain `torch.utils.data.Dataset`."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsdistill.relabelling.record import EpochRecord


class Replay(Dataset[tuple[Tensor, Tensor]]):
    """The N views of one epoch in the order of its mini-batches: (image (C, H, W), label (K,)), float32, on the CPU.

    Item i is computed from the records of itself and its partner alone, so ``DataLoader(replay, batch_size=B)``
    without shuffling, with any number of workers, gives the mini-batches that the teachers saw, to the last bit. Where
    a calibration left views out, ``DataLoader(replay, batch_sampler=replay.batches)`` gives them without those.

    Attributes:
        record: what is shown.
        labels: (N, K) logits, or (N, 2) distances.
        kept: (N,) bool, False for views that a calibration left out; None: all are kept.
    """

    def __init__(self, images: Tensor, record: EpochRecord, labels: Tensor, kept: Tensor | None) -> None:
        self._images, self.record, self.labels, self.kept = images, record, labels, kept

    def __len__(self) -> int:
        return len(self.record.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.record.shown_one(self._images, index), self.labels[index]

    @property
    def batches(self) -> list[list[int]]:
        """Items of each mini-batch, less what was left out; none that is empty."""
        parts = torch.split(torch.arange(len(self)), self.record.recipe.batch_size)
        if self.kept is not None:
            parts = tuple(part[self.kept[part]] for part in parts)
        return [part.tolist() for part in parts if len(part)]
