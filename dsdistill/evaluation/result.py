"""What scoring found out, and how it is shown and kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dsdistill.core import storage
from dsdistill.core.config import to_dict
from dsdistill.core.units import shown_size
from dsdistill.errors import OutputConflict
from dsdistill.evaluation.statistics import Score, paired_difference
from dsdistill.protocols import EvaluationProtocol

HARD = ", hard"
"""Ends the name of a row that is trained on classes where the protocol has teachers."""
TITLES = {
    "synthetic": "synthetic set",
    "synthetic, hard": "synthetic set, hard labels",
    "random": "random real images",
    "random, hard": "random real images, hard labels",
    "whole": "whole training set",
}
_MOST_CLASSES = 200  # a larger confusion table would swell the file


@dataclass(frozen=True)
class EvaluationResult:
    """Test accuracies of a set and of its baselines under one protocol and the same seeds.

    ``scores`` maps a row ("synthetic", "random", "whole"; where the protocol has teachers, also "synthetic, hard" and
    "random, hard", which learn from classes) to its accuracies; ``gain`` is the paired difference synthetic - random,
    ``hard_gain`` that of the hard rows. ``confusion`` maps a row to a (K, K) int64 table, summed over repeats: how many
    test images of each class (row) were taken for which (column). ``lr`` is the step size that a row's networks started
    with. ``seconds`` are spent per row, ``peak_memory`` in bytes over everything.
    """

    protocol: EvaluationProtocol
    scores: Mapping[str, Score]
    seconds: Mapping[str, float]
    images: Mapping[str, int]
    epochs: Mapping[str, int]
    lr: Mapping[str, float]
    confusion: Mapping[str, Tensor]
    classes: tuple[str, ...]
    peak_memory: int
    seed: int
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> Score:
        """Test accuracy of the synthetic set."""
        return self.scores["synthetic"]

    @property
    def gain(self) -> Score | None:
        """Paired difference to random real images; None when they were not scored."""
        return self._difference("synthetic", "random")

    @property
    def hard_gain(self) -> Score | None:
        """The same where both learn from classes; None where the protocol has no teachers."""
        return self._difference(f"synthetic{HARD}", f"random{HARD}")

    def _difference(self, row: str, other: str) -> Score | None:
        if row not in self.scores or other not in self.scores:
            return None
        return paired_difference(self.scores[row].values, self.scores[other].values)

    def per_class(self, row: str = "synthetic") -> dict[str, float]:
        """Share of each class's test images that were classified rightly, over all repeats; NaN for an absent class."""
        table = self.confusion[row].double()
        shares = (table.diagonal() / table.sum(1)).tolist()
        return dict(zip(self.classes, shares, strict=True))

    def class_table(self) -> str:
        """Accuracy of each class in percent, a column for each row of the result."""
        shares = {row: self.per_class(row) for row in self.scores}
        head = ("class", *(TITLES[row] for row in shares))
        lines = [(name, *(f"{100 * share[name]:.1f}" for share in shares.values())) for name in self.classes]
        return "\n".join(table([head, *lines]))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain containers; confusion tables up to 200 classes."""
        return {
            "format": "dsdistill.evaluation",
            "schema_version": 1,
            "protocol": {**to_dict(self.protocol), "title": self.protocol.title},
            "selection": _SELECTION[self.protocol.selection],
            "seed": self.seed,
            "scores": {row: score.to_json() for row, score in self.scores.items()},
            "gain_over_random": self.gain.to_json() if self.gain else None,
            "hard_gain_over_random": self.hard_gain.to_json() if self.hard_gain else None,
            "images": dict(self.images),
            "epochs": dict(self.epochs),
            "lr": dict(self.lr),
            "classes": list(self.classes),
            "per_class": {row: list(map(_or_none, self.per_class(row).values())) for row in self.scores},
            "confusion": (
                {row: table.tolist() for row, table in self.confusion.items()}
                if len(self.classes) <= _MOST_CLASSES
                else None
            ),
            "seconds": {row: round(value, 3) for row, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory,
            **self.context,
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write `to_json` into a file, atomically.

        Raises:
            OutputConflict: the file exists and ``overwrite`` is not set, or cannot be written.
        """
        if Path(path).exists() and not overwrite:
            raise OutputConflict(Path(path), "exists already; choose another file, or overwrite it")
        storage.ensure_writable(Path(path).parent)
        storage.write_json(Path(path), self.to_json())
        return Path(path)

    def __str__(self) -> str:
        settings: dict[str, Mapping[str, object]] = {"images": self.images, "epochs": self.epochs}
        if self.protocol.learned_lr:  # else it is one and the same in all rows
            settings["step size"] = {row: f"{lr:.4g}" for row, lr in self.lr.items()}
        rows = [("training images", *settings, "test accuracy %", "95 % interval", "n")]
        for row, score in self.scores.items():
            rows.append((TITLES[row], *(str(of[row]) for of in settings.values()), *cells(score), str(score.n)))
        lines = table(rows)
        for gain, labels in ((self.gain, ""), (self.hard_gain, " with hard labels")):
            if gain:
                spread = "" if gain.n == 1 else f" ± {100 * gain.half_width:.2f}"
                lines.append(f"synthetic - random{labels}, paired by seed: {100 * gain.mean:+.2f}{spread} points")
        if self.context.get("teaching"):
            lines.append(taught(self.context["teaching"], self.context["synthetic"]["bytes"]))
        chosen = "last epoch" if self.protocol.selection == "last" else "best epoch on held-out training images"
        lines.append(
            f"protocol {self.protocol.title}, {self.protocol.network.name}, fresh network and {chosen} each time"
        )
        return "\n".join(lines)


_SELECTION = {
    "last": "last epoch; test split scored once per network",
    "validation": "best epoch on real training images held out; test split scored once per network",
}


def taught(teaching: Mapping[str, Any], nbytes: Mapping[str, int]) -> str:
    """One line on the teachers, and on what their stored labels cost beside the images."""
    names = ", ".join(f"{one['name']} ({100 * one['accuracy']:.1f} %)" for one in teaching["teachers"])
    labels = teaching["labels"]
    if labels is None:
        return f"taught by {names}, asked while networks are trained"
    size = f"{shown_size(labels['bytes'])}, {labels['bytes'] / max(1, nbytes['images']):.1f} x the images"
    return f"{labels['kind']} labels by {names}: {size}"


def cells(score: Score) -> tuple[str, str]:
    """Mean and half width of a score in percent, as shown in tables."""
    return f"{100 * score.mean:.2f}", "-" if score.n == 1 else f"± {100 * score.half_width:.2f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head: the first column flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
