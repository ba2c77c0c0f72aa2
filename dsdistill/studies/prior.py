"""Prior performances of a committee (CV-DD, Cui et al., arXiv 2501.07575): what a set is worth that one teacher made.

For each teacher a set is distilled with it alone (SRe2L++), networks are trained on the labels that it gives, and their
mean accuracy, in percent, is written into the teacher's folder as its ``performance``. It is that on training images
held out of the set (which the teacher itself has seen), so that no vote follows the test split. The published committee
has constants (`PUBLISHED`), measured on the test split.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsdistill.core.config import require_instance, whole_number
from dsdistill.core.device import resolve_device
from dsdistill.core.rng import Rng
from dsdistill.core.units import shown_duration
from dsdistill.data import ImageSource
from dsdistill.engine import estimate, synthesize
from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.evaluation import EvaluationProtocol, EvaluationResult, evaluate, get_protocol
from dsdistill.experts import Committee, Teacher, Teachers
from dsdistill.methods import RandomReal, SRe2L
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
PLUS = SRe2L(ipc=10, init="patches")
"""SRe2L++, by which priors are measured unless told otherwise."""
_MODELS = ("resnet18", "resnet50", "shufflenet_v2", "mobilenet_v2", "densenet121")
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    data: dict(zip(_MODELS, values, strict=True))
    for data, values in {
        "cifar10": (63.0, 65.3, 68.5, 67.6, 67.4),
        "cifar100": (64.0, 60.6, 51.6, 59.4, 56.4),
        "tiny_imagenet": (46.5, 28.3, 43.6, 44.8, 41.5),
        "imagenette": (62.4, 52.0, 57.2, 54.0, 60.8),
        "imagenet": (56.4, 42.3, 52.5, 44.2, 40.6),
    }.items()
}
"""α of CV-DD's code by data and network, in percent: what sets distilled with one model alone were worth there."""
_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenette": 10, "imagenet": 1000}
_TIMED = 2  # epochs that are timed, after a first one


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
    study = _Measuring.of(folder, source, method, protocol, repeats, seed, device)
    found: dict[str, float] = {}
    for teacher in Committee.load(study.folder):
        if teacher.performance is None or again:
            place = study.place(teacher)
            made = synthesize(
                study.alone(teacher), study.known, seed=seed, device=device, out=place / "prior", overwrite=again
            )
            score = study.score(made, teacher, repeats=repeats).scores["synthetic"]
            history = {
                **teacher.history,
                "prior": f"measured by {study.protocol.title}, {repeats} networks, seed {seed}",
            }
            teacher = replace(teacher, performance=round(100 * score.mean, 2), history=history)
            teacher.save(place)
            logger.info("prior performance of %s: %.1f %%", teacher.name, teacher.performance)
        found[teacher.name] = teacher.performance or 0.0
    return found


@dataclass(frozen=True)
class PriorsEstimate:
    """Cost of priors that are not there yet: of which ``teachers``, and ``seconds`` of recovery and scoring."""

    teachers: tuple[str, ...]
    device: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self) | {"teachers": list(self.teachers)}

    def __str__(self) -> str:
        names = ", ".join(self.teachers) or "none: all are known"
        return f"priors of {names}, on {self.device}:\n  time    {shown_duration(self.seconds)}"


def estimate_priors(
    folder: str | Path,
    source: ImageSource,
    method: SRe2L = PLUS,
    *,
    protocol: str | EvaluationProtocol = "cvdd",
    repeats: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    again: bool = False,
) -> PriorsEstimate:
    """Say what `measure_priors` will cost, by a few steps of each teacher; nothing is written. Arguments as there."""
    study = _Measuring.of(folder, source, method, protocol, repeats, seed, device)
    epochs, seconds = study.protocol.epochs, 0.0
    open_ones = [one for one in Committee.load(study.folder) if one.performance is None or again]
    made = synthesize(RandomReal(ipc=method.ipc), study.known, seed=seed, device=device, progress=False)
    for teacher in open_ones:
        seconds += estimate(study.alone(teacher), study.known, seed=seed, device=device).seconds
        first, more = (sum(study.score(made, teacher, epochs=count).seconds.values()) for count in (1, 1 + _TIMED))
        seconds += repeats * (first + max(0.0, more - first) / _TIMED * (epochs - 1))
    return PriorsEstimate(tuple(one.name for one in open_ones), resolve_device(device).type, seconds)


def write_published(folder: str | Path, data: str, *, again: bool = False) -> Mapping[str, float]:
    """Write the priors that CV-DD publishes into the teachers of a folder, known by their networks.

    Args:
        folder: of a committee.
        data: "cifar10", "cifar100", "tiny_imagenet", "imagenette" or "imagenet".
        again: replace those that were measured.

    Returns:
        By the teacher's name, in percent.

    Raises:
        UnknownName: nothing is published for that data. InvalidSetting: nor for one of the networks; then nothing is
            written. And what `Committee.load` does.
    """
    if data not in PUBLISHED:
        raise UnknownName("data with published priors", data, PUBLISHED)
    committee, known = Committee.load(folder), PUBLISHED[data]
    models = {teacher.name: _model(teacher) for teacher in committee}
    other = [name for name, model in models.items() if model not in known]
    if other:
        raise InvalidSetting("teachers", other, f"networks of the published committee: {', '.join(known)}")
    for teacher in committee:
        if len(teacher.classes) != _CLASSES[data]:
            told = f"{_CLASSES[data]} classes, as {data} has; teacher {teacher.name!r} has {len(teacher.classes)}"
            raise InvalidSetting("data", data, told)
        if teacher.performance is not None and not again and "published" not in str(teacher.history.get("prior")):
            told = f"with again (--again): teacher {teacher.name!r} has a prior of its own, {teacher.performance:.1f} %"
            raise InvalidSetting("published", True, told)
    for teacher in committee:
        history = {**teacher.history, "prior": f"published for {data} by CV-DD, measured on the test split"}
        known_one = replace(teacher, performance=known[models[teacher.name]], history=history)
        known_one.save(_place(Path(folder), teacher))
    return {name: known[model] for name, model in models.items()}


def _model(teacher: Teacher) -> str:
    """As the paper names it: ShuffleNetV2 x0.5 up to 64 pixels and x1.0 above are one column."""
    return re.sub(r"_x(0_5|1_0)$", "", teacher.spec.name.removeprefix("torchvision:"))


def _place(folder: Path, teacher: Teacher) -> Path:
    return folder if (folder / "teacher.json").exists() else folder / teacher.name


@dataclass(frozen=True)
class _Measuring:
    """What measuring a prior takes, after every check that needs no work."""

    folder: Path
    known: ImageSource
    method: SRe2L
    protocol: EvaluationProtocol
    seed: int
    device: str | torch.device | None

    @classmethod
    def of(
        cls,
        folder: str | Path,
        source: ImageSource,
        method: SRe2L,
        protocol: str | EvaluationProtocol,
        repeats: int,
        seed: int,
        device: str | torch.device | None,
    ) -> "_Measuring":
        require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
        whole_number("repeats", repeats, 1)
        chosen = get_protocol(protocol) if isinstance(protocol, str) else protocol
        if chosen.distillation is None:
            raise InvalidSetting("protocol", chosen.name, "one that learns from teachers, as cvdd does")
        return cls(Path(folder), _held_out(source, seed), method, chosen, seed, device)

    def place(self, teacher: Teacher) -> Path:
        return _place(self.folder, teacher)

    def alone(self, teacher: Teacher) -> SRe2L:
        return replace(self.method, teachers=Teachers(folder=str(self.place(teacher))))

    def score(
        self, made: SyntheticDataset, teacher: Teacher, *, repeats: int = 1, epochs: int | None = None
    ) -> EvaluationResult:
        return evaluate(
            made,
            self.known,
            protocol=self.protocol,
            epochs=epochs,
            teachers=Committee([teacher]),
            repeats=repeats,
            baselines=(),
            seed=self.seed,
            device=self.device,
            progress=epochs is None,
        )


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
