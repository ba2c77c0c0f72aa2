"""What networks learn from where a protocol has distillation: stored labels of the set, or teachers who are asked."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsdistill.core.config import require_instance
from dsdistill.core.device import default_chunk
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee
from dsdistill.protocols import EvaluationProtocol
from dsdistill.relabelling import Distances, LabelSet
from dsdistill.relabelling.lessons import Lessons, interpolated, measured
from dsdistill.relabelling.plan import require_teachers, voting
from dsdistill.relabelling.record import require_recordable
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import Teacher, TrainingSet


@dataclass
class Teaching:
    """Labels of the set, or teachers, or both; of one make.

    Attributes:
        synthetic: the set.
        labels: of the set; None: teachers are asked about it too.
        teachers: asked about real images; None where there are no rows of such.
        weights: of the teachers' logits, of sum 1; those of the labels where there are some.
    """

    synthetic: SyntheticDataset
    labels: LabelSet | None
    teachers: Committee | None
    weights: tuple[float, ...]
    _replayed: Lessons | None = field(init=False, default=None)
    _told: dict[str, Tensor] = field(init=False, default_factory=dict)

    def begin(self, real: ImageSource, epochs: int) -> None:
        """Read the labels of as many epochs, lest a damaged file ends hours of training; bring the teachers to the
        device of the real images, and see whether they know these.

        Raises:
            BadArtifact: a file of the labels is missing or damaged.
            BadData: the teachers do not know the images; see `Committee.check`.
        """
        if self.labels is not None:
            self.labels.verify(epochs)
        if self.teachers is not None:
            for teacher in self.teachers:
                teacher.network.to(real.device)
            self.teachers.check(real)

    def given(
        self, row: str, data: TrainingSet, protocol: EvaluationProtocol, rng: Rng, *, mirror_safe: bool
    ) -> TrainingSet:
        """The images of a row with its lessons; without, where teachers are to be asked about each mini-batch."""
        augmentation = protocol.augmentation and protocol.augmentation.suited(mirror_safe)
        shown = replace(protocol, augmentation=augmentation)
        if row == "synthetic" and self.labels is not None:
            if self.labels.kind == "static":
                return data._replace(lessons=self.labels.lessons(self.synthetic, data.device, recipe=shown, rng=rng))
            if self._replayed is None:  # the same for every network
                self._replayed = self.labels.lessons(self.synthetic, data.device)
            return data._replace(lessons=self._replayed)
        classes = len(self.synthetic.classes)
        if protocol.targets == "images":
            told = self._clean(row, data, protocol)
            return data._replace(lessons=interpolated(data, told, shown, rng, classes))
        if not isinstance(protocol.distillation, Distances):
            return data
        images, targets = data.fetch(torch.arange(data.size, device=data.device))
        hard = targets if targets.dim() == 1 else targets.argmax(1)
        return data._replace(lessons=measured(images, hard, self.teacher(protocol), shown, rng, classes))

    def _clean(self, row: str, data: TrainingSet, protocol: EvaluationProtocol) -> Tensor:
        """Logits (N, K) of the clean images of a row; the random ones are others for every network."""
        if row in self._told:
            return self._told[row]
        ask, rows = self.teacher(protocol), torch.arange(data.size, device=data.device)
        parts = torch.split(rows, default_chunk(data.shape, data.device))
        told = torch.cat([ask(data.fetch(part)[0]) for part in parts])
        if row != "random":
            self._told[row] = told
        return told

    def teacher(self, protocol: EvaluationProtocol) -> Teacher:
        """Gives the committee's logits of a mini-batch as the network sees it."""
        assert self.teachers is not None
        committee, weights = self.teachers, torch.tensor(self.weights)

        def asked(images: Tensor) -> Tensor:
            by_batch = protocol.teacher_mode == "batch"
            return committee.logits(images, weights, batch_statistics=by_batch, parts=protocol.sub_batches)

        return asked

    def to_json(self) -> dict[str, Any]:
        """Plain containers: who taught, and what their labels cost."""
        labels, asked = self.labels, self.teachers or ()
        known = (
            [{"name": one.name, "digest": one.digest, "accuracy": one.accuracy} for one in asked]
            if labels is None
            else [{key: one[key] for key in ("name", "digest", "accuracy")} for one in labels.heading.teachers]
        )
        if labels is None:
            return {"teachers": known, "weights": list(self.weights), "labels": None}
        told = labels.heading.to_json()
        kept = {key: told[key] for key in ("kind", "epochs", "codec", "teacher_mode", "weights", "calibration", "seed")}
        return {"teachers": known, "labels": {**kept, "bytes": labels.nbytes}}


def checked_teaching(
    protocol: EvaluationProtocol,
    synthetic: SyntheticDataset,
    source: ImageSource,
    labels: LabelSet | None,
    teachers: Committee | None,
    baselines: tuple[str, ...],
) -> tuple[EvaluationProtocol, Teaching | None]:
    """What a protocol's networks learn from, None where that is classes; and the protocol, with the loss of the labels.

    Labels of distances are learned with `Distances`, which replaces the protocol's distillation. Beside labels,
    teachers vote on the real images as they did on the set: the protocol's vote_temperature becomes that of the labels.

    Raises:
        InvalidSetting: labels or teachers without distillation or the other way round; labels that were made for
            another training; or teachers who are to vote by priors that are not known. BadData: labels or teachers of
            something else.
    """
    if labels is not None:
        require_instance("labels", labels, LabelSet, "labels of the set: LabelSet.load(...) opens folders")
    if teachers is not None:
        require_instance("teachers", teachers, Committee, "teachers: Committee.load(...) opens folders")
    given = [name for name, value in (("labels", labels), ("teachers", teachers)) if value is not None]
    if protocol.distillation is None:
        if given:
            raise InvalidSetting(given[0], labels or teachers, f"none: protocol {protocol.name} has no distillation")
        return protocol, None
    if not given:
        raise InvalidSetting(
            "teachers",
            None,
            f"protocol {protocol.name} learns from teachers: give a committee (teachers=Committee.load(...), "
            "--teachers FOLDER), or labels that one made of the set (labels=LabelSet.load(...), --labels FOLDER)",
        )
    if labels is not None and labels.kind == "distances" and not isinstance(protocol.distillation, Distances):
        protocol = replace(protocol, distillation=Distances())
    _check_targets(labels, protocol)
    check_rows(protocol, baselines)
    if labels is not None:
        if len(labels.heading.weights) > 1:
            protocol = replace(protocol, vote_temperature=labels.heading.vote_temperature)
        labels.require(synthetic)
        _check_labels(labels, protocol, mirror_safe=source.mirror_safe)
    if teachers is not None:
        require_teachers(teachers, synthetic)
    elif baselines:
        raise InvalidSetting(
            "teachers",
            None,
            f"a committee (--teachers FOLDER), of whom the real images of {', '.join(baselines)} are learned; or none "
            "of these (baselines=(), --baselines none)",
        )
    _check_both(labels, teachers)
    if labels is not None:
        weights = labels.heading.weights
    else:
        assert teachers is not None
        weights = voting(teachers, protocol.vote_temperature)
    return protocol, Teaching(synthetic, labels, teachers, weights)


def check_rows(protocol: EvaluationProtocol, baselines: tuple[str, ...]) -> None:
    """Refuse a protocol with teachers that contradicts itself, or the rows asked for.

    Raises:
        InvalidSetting: naming the setting and the mend.
    """
    if protocol.distillation is None:
        return
    _check_targets(None, protocol)
    if isinstance(protocol.distillation, Distances) and "whole" in baselines:
        raise InvalidSetting("baselines", baselines, "not the whole training set: distances are asked of small sets")


def _check_targets(labels: LabelSet | None, protocol: EvaluationProtocol) -> None:
    """Refuse labels of views where clean images are labelled, or the other way round, and what goes with no labels."""
    of_images = protocol.targets == "images"
    if labels is not None and (labels.kind == "static") != of_images:
        allowed = "static labels" if of_images else "labels of views, replayed or of distances"
        raise InvalidSetting(
            "labels",
            labels,
            f"{allowed}, as protocol {protocol.name} has targets={protocol.targets!r}; these are of kind "
            f"{labels.kind!r}",
        )
    if of_images and isinstance(protocol.distillation, Distances):
        raise InvalidSetting("targets", protocol.targets, "'views': distances are those of a mixed view")
    if of_images and protocol.teacher_mode == "batch":
        raise InvalidSetting(
            "teacher_mode", protocol.teacher_mode, "'eval' with targets='images': clean images are in no mini-batch"
        )
    if of_images or isinstance(protocol.distillation, Distances):
        require_recordable(protocol)


def _check_labels(labels: LabelSet, protocol: EvaluationProtocol, *, mirror_safe: bool) -> None:
    """Refuse labels that were made for another training."""
    heading = labels.heading
    if isinstance(protocol.distillation, Distances) != (labels.kind == "distances"):
        raise InvalidSetting("labels", labels, f"labels of logits or distances, as {protocol.distillation} learns from")
    if heading.recipe is None or heading.epochs is None:
        return
    if protocol.epochs > heading.epochs:
        raise InvalidSetting(
            "epochs", protocol.epochs, f"at most {heading.epochs}, those that the labels are of; or label more epochs"
        )
    augmentation = protocol.augmentation and protocol.augmentation.suited(mirror_safe)
    wanted: dict[str, object] = {"batch_size": protocol.batch_size, "augmentation": augmentation, "mix": protocol.mix}
    made_for = {name: getattr(heading.recipe, name) for name in wanted}
    wanted["teacher_mode"], made_for["teacher_mode"] = protocol.teacher_mode, heading.teacher_mode
    if protocol.teacher_mode == "batch":
        wanted["sub_batches"], made_for["sub_batches"] = protocol.sub_batches, heading.recipe.sub_batches
    for name, value in wanted.items():
        if value != made_for[name]:
            raise InvalidSetting(
                name, value, f"{made_for[name]!r}, as in the training that the labels were made for; or label anew"
            )


def _check_both(labels: LabelSet | None, teachers: Committee | None) -> None:
    if labels is None or teachers is None:
        return
    made, asked = ([one["digest"] for one in labels.heading.teachers], [one.digest for one in teachers])
    if made != asked:
        names = ", ".join(str(one["name"]) for one in labels.heading.teachers)
        given = ", ".join(one.name for one in teachers)
        raise BadData(
            f"the labels were made by other teachers ({names}) than those given ({given}): rows under one protocol "
            "need the same"
        )
