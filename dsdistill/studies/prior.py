"""Prior performances of a committee (CV-DD, Cui et al., arXiv 2501.07575): what a set is worth that one teacher made.

For each teacher a set is distilled with it alone (SRe2L++), networks are trained on the labels that it gives, and their
mean accuracy, in percent, is written into the teacher's folder as its ``performance``. It is that on training images
held out of the set (which the teacher itself has seen), so that no vote follows the test split. The published committee
has constants, measured on the test split.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsdistill.core.config import require_instance
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import synthesize
from dsdistill.errors import InvalidSetting
from dsdistill.evaluation import EvaluationProtocol, evaluate, get_protocol
from dsdistill.experts import Committee, Teachers
from dsdistill.methods import SRe2L

logger = logging.getLogger("dsdistill")
PLUS = SRe2L(ipc=10, init="patches")
"""SRe2L++, by which priors are measured unless told otherwise."""


def measure_priors(
    folder: str | Path,
    source: ImageSource,
    method: SRe2L = PLUS,
    *,
    protocol: str | EvaluationProtocol = "cvdd",
    repeats: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    again: bool = False,
) -> Mapping[str, float]:
    """Measure and write the prior performance of each teacher of a folder that has none yet; the same call continues.

    Args:
        folder: of a committee; the sets are kept in a folder ``prior`` in each member's.
        source: the real images that the teachers were trained on. A tenth of each class is held out and scores; the
            test split stays closed.
        method: how sets are distilled; its ``teachers`` are replaced.
        protocol: how networks learn from the labels of the teacher.
        repeats: networks for each.
        seed, device: as for `synthesize`.
        again: measure those that have one too.

    Returns:
        By the teacher's name, in percent.

    Raises:
        InvalidSetting: the protocol learns from no teacher. And what `Committee.load`, `synthesize` and `evaluate` do.
    """
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    chosen = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if chosen.distillation is None:
        raise InvalidSetting("protocol", chosen.name, 'one that learns from teachers, as "cvdd" does')
    found: dict[str, Any] = {}
    place, known = Path(folder), _held_out(source, seed)
    for teacher in Committee.load(place):
        own = place if (place / "teacher.json").exists() else place / teacher.name
        if teacher.performance is None or again:
            alone = replace(method, teachers=Teachers(folder=str(own)))
            made = synthesize(alone, known, seed=seed, device=device, out=own / "prior", overwrite=again)
            score = evaluate(
                made,
                known,
                protocol=chosen,
                teachers=Committee([teacher]),
                repeats=repeats,
                baselines=(),
                seed=seed,
                device=device,
            ).scores["synthetic"]
            teacher = replace(teacher, performance=round(100 * score.mean, 2))
            teacher.save(own)
            logger.info("prior performance of %s: %.1f %%", teacher.name, teacher.performance)
        assert teacher.performance is not None
        found[teacher.name] = teacher.performance
    return found


def _held_out(source: ImageSource, seed: int) -> ImageSource:
    """The training images but a tenth of each class, which is the test split."""
    fit, held = source.train_only().split(0.1, Rng(seed).at("prior", device=source.device))
    return ImageSource(
        source.name,
        source.classes,
        fit.store,
        fit.targets,
        normalization=source.normalization,
        mirror_safe=source.mirror_safe,
        open_test=lambda: held,
    )
