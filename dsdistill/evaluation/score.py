"""`evaluate`: the score of a set under a protocol, beside random real images and the whole training set."""

import logging
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsdistill.core import storage
from dsdistill.core.config import to_dict
from dsdistill.core.device import default_chunk, peak_memory, resolve_device, settle_allocator, synchronize
from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, Diverged, InvalidSetting, OutputConflict, UnknownName
from dsdistill.evaluation.protocol import EvaluationProtocol, get_protocol
from dsdistill.evaluation.statistics import Score, paired_difference
from dsdistill.evaluation.train import TrainingSet, accuracy, fresh_network, train
from dsdistill.synthetic import SyntheticDataset, library_versions

logger = logging.getLogger("dsdistill")
BASELINES = ("random", "whole")


@dataclass(frozen=True)
class EvaluationResult:
    """Test accuracies of a set and of its baselines under one protocol and the same seeds.

    ``scores`` maps a row ("synthetic", "random", "whole") to its accuracies; ``gain`` is the paired difference
    synthetic - random. ``seconds`` are spent per row, ``peak_memory`` in bytes over everything.
    """

    protocol: EvaluationProtocol
    scores: Mapping[str, Score]
    seconds: Mapping[str, float]
    images: Mapping[str, int]
    epochs: Mapping[str, int]
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
        random = self.scores.get("random")
        return paired_difference(self.accuracy.values, random.values) if random else None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain containers."""
        return {
            "format": "dsdistill.evaluation",
            "schema_version": 1,
            "protocol": {**to_dict(self.protocol), "title": self.protocol.title},
            "selection": "last epoch; test split scored once per network",
            "seed": self.seed,
            "scores": {row: score.to_json() for row, score in self.scores.items()},
            "gain_over_random": self.gain.to_json() if self.gain else None,
            "images": dict(self.images),
            "epochs": dict(self.epochs),
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
        titles = {"synthetic": "synthetic set", "random": "random real images", "whole": "whole training set"}
        rows = [("training images", "images", "epochs", "test accuracy %", "95 % interval", "n")]
        for row, score in self.scores.items():
            interval = "-" if score.n == 1 else f"± {100 * score.half_width:.2f}"
            figures = (str(self.images[row]), str(self.epochs[row]), f"{100 * score.mean:.2f}", interval, str(score.n))
            rows.append((titles[row], *figures))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if not column else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        if self.gain:
            spread = "" if self.gain.n == 1 else f" ± {100 * self.gain.half_width:.2f}"
            lines.append(f"synthetic - random, paired by seed: {100 * self.gain.mean:+.2f}{spread} points")
        network = self.protocol.network.name
        lines.append(f"protocol {self.protocol.title}, {network}, fresh network and last epoch in every repeat")
        return "\n".join(lines)


def evaluate(
    synthetic: SyntheticDataset,
    source: ImageSource,
    *,
    protocol: str | EvaluationProtocol = "dsa",
    epochs: int | None = None,
    repeats: int = 5,
    baselines: Iterable[str] = ("random",),
    whole_epochs: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Train ``repeats`` fresh networks on ``synthetic`` and test each once, after its last epoch.

    Repeat i uses the same seeds for every row: the same initial network, and (between rows of equal size) the same
    order and views, so rows are paired. The random row draws new real images in each repeat, as many of each class
    as the set stores, or all there are.

    Args:
        synthetic: the set to score.
        source: the real data it was made from; its test split is opened here and nowhere else.
        protocol: name or instance; a changed one is ``dataclasses.replace(get_protocol("dsa"), lr=0.1)``.
        epochs: epochs instead of the protocol's, which the result then says.
        repeats: networks per row; the interval covers networks (and random draws), not other synthesis seeds.
        baselines: any of "random" and "whole" (the whole training set under the same protocol).
        whole_epochs: epochs of the whole row, None for the protocol's; shown in the table.
        seed: the run's seed.
        device: as for `synthesize`.
        progress: show a bar where standard error is a terminal.

    Raises:
        BadData: the set and the source differ in classes or shape, or the source has no test split.
        InvalidSetting, UnknownName, DeviceUnavailable: before any work starts.
        Diverged: training produced NaN or infinity.
        DistillError: a network factory handed out a network that is not fresh.
    """
    resolved = resolve_device(device)
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    protocol = protocol if epochs is None else replace(protocol, epochs=epochs)
    baselines = (baselines,) if isinstance(baselines, str) else tuple(dict.fromkeys(baselines))
    _check(synthetic, source, repeats, baselines, whole_epochs, seed, protocol)
    settle_allocator(resolved)
    real = source.normalized_by(synthetic.normalization).to(resolved)
    test = real.test.to(resolved)
    scorer = _Scorer(protocol, real, test, seed, resolved)
    rows: dict[str, list[float]] = {row: [] for row in ("synthetic", *baselines)}
    seconds = dict.fromkeys(rows, 0.0)
    images = dict.fromkeys(rows, 0)
    passes = {row: (whole_epochs or protocol.epochs) if row == "whole" else protocol.epochs for row in rows}
    logger.info("scoring: %d networks for each of %s, protocol %s", repeats, ", ".join(rows), protocol.title)
    if resolved.type == "cuda":
        torch.cuda.reset_peak_memory_stats(resolved)
    with (
        isolated_global_rng(resolved),
        tqdm(total=repeats * len(rows), desc="evaluate", unit="network", disable=None if progress else True) as bar,
    ):
        for repeat in range(repeats):
            for row in rows:
                begin = time.perf_counter()
                data = scorer.training_set(row, synthetic, repeat)
                rows[row].append(scorer.score(data, repeat, passes[row]))
                synchronize(resolved)
                seconds[row] += time.perf_counter() - begin
                images[row] = len(data.targets)
                bar.update(1)
    return EvaluationResult(
        protocol=protocol,
        scores={row: Score(tuple(values)) for row, values in rows.items()},
        seconds=seconds,
        images=images,
        epochs=passes,
        peak_memory=peak_memory(resolved),
        seed=seed,
        context=_context(synthetic, source, resolved),
    )


@dataclass
class _Scorer:
    protocol: EvaluationProtocol
    real: ImageSource
    test: ImageSource
    seed: int
    device: torch.device

    def training_set(self, row: str, synthetic: SyntheticDataset, repeat: int) -> TrainingSet:
        """Images and targets of a row, on the device."""
        if row == "whole":
            return TrainingSet(self.real.gather, self.real.targets, self.real.shape)
        if row == "synthetic":
            images, targets = (tensor.to(self.device) for tensor in synthetic.tensors())
        else:
            rng = Rng(self.seed, job=f"repeat/{repeat}", device=self.device)
            classes = range(self.real.num_classes)
            drawn = self.real.per_class_indices(classes, synthetic.ipc, rng.at("random real"))
            blocks = torch.split(drawn, self.real.sizes_per_class(classes, synthetic.ipc))
            index = torch.cat([block[:n] for block, n in zip(blocks, synthetic.counts, strict=True)])
            images, targets = self.real.gather(index), self.real.targets[index]
        return TrainingSet(images.__getitem__, targets, self.real.shape)

    def score(self, data: TrainingSet, repeat: int, epochs: int) -> float:
        """Test accuracy of a fresh network trained on the data."""
        rng = Rng(self.seed, job=f"repeat/{repeat}", device=self.device)
        protocol = replace(self.protocol, epochs=epochs)
        network = fresh_network(protocol, self.real.shape, self.real.num_classes, rng)
        seed_global(rng.integer("global"), self.device)
        train(network, data, protocol, rng, mirror_safe=self.real.mirror_safe)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
            raise Diverged(f"training of {protocol.network.name}", f"repeat {repeat}", epochs, "a parameter")
        return accuracy(network, self.test, chunk=default_chunk(self.test.shape, self.device))


def _check(
    synthetic: SyntheticDataset,
    source: ImageSource,
    repeats: int,
    baselines: tuple[str, ...],
    whole_epochs: int | None,
    seed: int,
    protocol: EvaluationProtocol,
) -> None:
    for name, value in (("repeats", repeats), ("whole_epochs", whole_epochs)):
        if (value is not None or name == "repeats") and (not isinstance(value, int) or value < 1):
            raise InvalidSetting(name, value, "an integer of at least 1")
    if not isinstance(seed, int):
        raise InvalidSetting("seed", seed, "an integer")
    for baseline in baselines:
        if baseline not in BASELINES:
            raise UnknownName("baseline", baseline, BASELINES)
    protocol.network.check(source.shape, source.num_classes)
    if synthetic.classes != source.classes:
        raise BadData(
            f"the set has classes {_short(synthetic.classes)} but {source.name!r} has {_short(source.classes)}: "
            "score a set on the data it was made from"
        )
    if synthetic.shape != source.shape:
        raise BadData(f"the set's images are {synthetic.shape}, those of {source.name!r} are {source.shape} (C, H, W)")
    if synthetic.recipe.source.get("fingerprint") not in (None, source.fingerprint):
        logger.warning(
            "the set was made from other images than the training split of %r (fingerprints differ): if the splits "
            "differ, its test images may have been seen",
            source.name,
        )
    if not source.has_test:
        raise BadData(
            f"{source.name!r} has no test split to score on; load it with one "
            "(a test/ or val/ folder, or from_dataset(train, test))"
        )


def _short(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"


def _context(synthetic: SyntheticDataset, source: ImageSource, device: torch.device) -> dict[str, Any]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "synthetic": {
            "method": synthetic.recipe.method,
            "seed": synthetic.recipe.seed,
            "ipc": synthetic.ipc,
            "bytes": synthetic.nbytes._asdict(),
            "notes": list(synthetic.recipe.notes),
        },
        "source": {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "mirror_safe": source.mirror_safe,
        },
        "device": {"type": device.type, "hardware": hardware, "threads": torch.get_num_threads()},
        "versions": library_versions(),
    }
