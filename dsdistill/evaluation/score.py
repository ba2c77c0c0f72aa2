"""`evaluate`: the score of a set under a protocol, beside random real images and the whole training set."""

import logging
import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsdistill.core.config import require_instance, whole_number
from dsdistill.core.device import peak_memory, resolve_device, settle_allocator, synchronize
from dsdistill.core.rng import isolated_global_rng
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting, UnknownName
from dsdistill.evaluation.examine import accuracy
from dsdistill.evaluation.result import HARD, EvaluationResult
from dsdistill.evaluation.scorer import Scorer
from dsdistill.evaluation.statistics import Score
from dsdistill.evaluation.step_size import step_sizes
from dsdistill.evaluation.teaching import checked_teaching
from dsdistill.experts import Committee
from dsdistill.protocols import EvaluationProtocol, get_protocol
from dsdistill.recipe import library_versions
from dsdistill.relabelling import LabelSet
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
BASELINES = ("random", "whole")


def evaluate(
    synthetic: SyntheticDataset,
    source: ImageSource,
    *,
    protocol: str | EvaluationProtocol = "dsa",
    epochs: int | None = None,
    repeats: int = 5,
    baselines: Iterable[str] = ("random",),
    whole_epochs: int | None = None,
    together: int = 1,
    labels: LabelSet | None = None,
    teachers: Committee | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Train ``repeats`` fresh networks on ``synthetic`` and test each once, after its last epoch.

    A protocol with ``selection="validation"`` tests the epoch that is best on real training images held out for it;
    the baselines then draw from the others (the synthetic set may have been made from all of them). One with
    ``learned_lr`` trains on a set that carries a learned step size with that, on the baselines with its own.

    Repeat i uses the same seeds for every row: the same initial network, and (between rows of equal size) the same
    order and views, so rows are paired. The random row draws new real images in each repeat, as many of each class
    as the set stores, or all there are.

    Under a protocol with distillation the set is learned from ``labels``, or from ``teachers`` who are asked while
    networks are trained; real images always from ``teachers``. Beside the set and the random images then stands the
    same training on their classes, so that what teachers add is seen.

    Args:
        synthetic: the set to score.
        source: the real data it was made from; its test split is opened here and nowhere else.
        protocol: name or instance; a changed one is ``dataclasses.replace(get_protocol("dsa"), lr=0.1)``.
        epochs: epochs instead of the protocol's, which the result then says.
        repeats: networks per row; the interval covers networks (and random draws), not other synthesis seeds.
        baselines: any of "random" and "whole" (the whole training set under the same protocol).
        whole_epochs: epochs of the whole row, None for the protocol's; shown in the table.
        together: networks trained as one stacked computation. More may be faster where one leaves the device idle
            (small networks, few images); changes results only by rounding, and needs more memory.
        labels: the teachers' labels of the set, made for this protocol; of protocols with distillation.
        teachers: who is asked; of protocols with distillation. With labels beside them, those who gave these.
        seed: the run's seed.
        device: as for `synthesize`.
        progress: show a bar where standard error is a terminal.

    Raises:
        BadData: the set and the source differ in classes or shape, the source has no test split, or the step size that
            the set carries and the protocol asks for is no positive, finite number; or labels or teachers are of
            something else.
        InvalidSetting, UnknownName, DeviceUnavailable: before any work starts; also if a protocol with distillation
            lacks labels and teachers, or one without it has them, or the labels were made for another training.
        BadArtifact: a file of the labels is missing or damaged; before any training too.
        Diverged: training produced NaN or infinity.
        OutOfMemory: even with one image at a time, or with ``together`` networks.
        DistillError: a network factory handed out a network that is not fresh.
    """
    require_instance("synthetic", synthetic, SyntheticDataset, "a set: SyntheticDataset.load(...) opens folders")
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    resolved = resolve_device(device)
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    protocol = protocol if epochs is None else replace(protocol, epochs=epochs)
    baselines = (baselines,) if isinstance(baselines, str) else tuple(dict.fromkeys(baselines))
    seed = whole_number("seed", seed)
    repeats, together = whole_number("repeats", repeats, 1), whole_number("together", together, 1)
    whole_epochs = whole_number("whole_epochs", whole_epochs, 1) if whole_epochs is not None else None
    _check(synthetic, source, baselines, protocol)
    if together > 1 and protocol.selection != "last":
        raise InvalidSetting("together", together, "networks selected on validation images are trained one by one")
    protocol, teaching = checked_teaching(protocol, synthetic, source, labels, teachers, baselines)
    if together > 1 and teaching is not None:
        raise InvalidSetting("together", together, "networks that learn from teachers are trained one by one")
    rows = _rows(baselines, taught=teaching is not None)
    rates = step_sizes(protocol, synthetic, rows)
    if f"synthetic{HARD}" in rates:
        rates[f"synthetic{HARD}"] = rates["synthetic"]
    settle_allocator(resolved)
    real = source.normalized_by(synthetic.normalization).to(resolved)
    if teaching is not None:
        teaching.begin(real, protocol.epochs)
    scorer = Scorer(protocol, synthetic, real, seed, resolved, teaching)
    passes = {row: (whole_epochs or protocol.epochs) if row == "whole" else protocol.epochs for row in rows}
    accuracies: dict[str, list[float]] = {row: [] for row in rows}
    tables: dict[str, Tensor] = {}
    seconds = dict.fromkeys(rows, 0.0)
    logger.info("scoring: %d networks for each of %s, protocol %s", repeats, ", ".join(rows), protocol.title)
    if resolved.type == "cuda":
        torch.cuda.reset_peak_memory_stats(resolved)
    with (
        isolated_global_rng(resolved),
        tqdm(total=repeats * len(rows), desc="evaluate", unit="network", disable=None if progress else True) as bar,
    ):
        for first in range(0, repeats, together):
            group = range(first, min(first + together, repeats))
            for row in rows:
                begin = time.perf_counter()
                for table in scorer.confusions(row, group, passes[row], rates[row]):
                    accuracies[row].append(accuracy(table))
                    tables[row] = tables[row] + table if row in tables else table
                synchronize(resolved)
                seconds[row] += time.perf_counter() - begin
                bar.update(len(group))
    return EvaluationResult(
        protocol=protocol,
        scores={row: Score(tuple(values)) for row, values in accuracies.items()},
        seconds=seconds,
        images={row: scorer.sizes[row] for row in rows},
        epochs=passes,
        lr=rates,
        confusion=tables,
        classes=source.classes,
        peak_memory=peak_memory(resolved),
        seed=seed,
        context=_context(synthetic, source, scorer, together),
    )


def _rows(baselines: tuple[str, ...], *, taught: bool) -> tuple[str, ...]:
    """Rows of the table; where there are teachers, the set and the random images have one on their classes too."""
    rows = ("synthetic", *baselines)
    if not taught:
        return rows
    return tuple(name for row in rows for name in ((row,) if row == "whole" else (row, f"{row}{HARD}")))


def _check(
    synthetic: SyntheticDataset,
    source: ImageSource,
    baselines: tuple[str, ...],
    protocol: EvaluationProtocol,
) -> None:
    for baseline in baselines:
        if baseline not in BASELINES:
            raise UnknownName("baseline", baseline, BASELINES)
    protocol.network.require((), source.shape, source.num_classes)
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


def _context(synthetic: SyntheticDataset, source: ImageSource, scorer: Scorer, together: int) -> dict[str, Any]:
    device = scorer.device
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
        "device": {
            "type": device.type,
            "hardware": hardware,
            "threads": torch.get_num_threads(),
            "chunk": scorer.chunk,
            "together": together,
        },
        "teaching": None if scorer.teaching is None else scorer.teaching.to_json(),
        "versions": library_versions(),
    }
