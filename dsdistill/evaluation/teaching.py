"""What networks learn from where a protocol has distillation: stored labels of the set, or teachers who are asked."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsdistill.core.config import require_instance
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.evaluation.protocol import EvaluationProtocol
from dsdistill.experts import Committee
from dsdistill.relabelling import Distances, LabelSet
from dsdistill.relabelling.lessons import Lessons, measured
from dsdistill.relabelling.plan import require_teachers
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import Teacher, TrainingSet


@dataclass
class Teaching:
    """Labels of the set, or teachers, or both; of one make.

    Attributes:
        synthetic: the set.
        labels: of the set; None: teachers are asked about it too.
        teachers: asked about real images; None where there are no rows of such.
    """

    synthetic: SyntheticDataset
    labels: LabelSet | None
    teachers: Committee | None
    _replayed: Lessons | None = field(init=False, default=None)

    def begin(self, real: ImageSource) -> None:
        """Bring the teachers to the device of the real images, and see whether they know these.

        Raises:
            BadData: they do not; see `Committee.check`.
        """
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
        if not isinstance(protocol.distillation, Distances):
            return data
        images, targets = data.fetch(torch.arange(data.size, device=data.device))
        classes = targets if targets.dim() == 1 else targets.argmax(1)
        return data._replace(
            lessons=measured(images, classes, self.teacher(protocol), shown, rng, len(self.synthetic.classes))
        )

    def teacher(self, protocol: EvaluationProtocol) -> Teacher:
        """Gives the committee's logits of a mini-batch as the network sees it."""
        assert self.teachers is not None
        committee, weights = self.teachers, None
        if self.labels is not None:
            weights = torch.tensor(self.labels.heading.weights)

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
            return {"teachers": known, "labels": None}
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

    Labels of distances are learned with `Distances`, which replaces the protocol's distillation.

    Raises:
        InvalidSetting: labels or teachers without distillation or the other way round; or labels that were made for
            another training. BadData: labels or teachers of something else.
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
            f"protocol {protocol.name} learns from teachers: give a committee (teachers=Committee.load(...)), or "
            "labels that one made of the set (labels=LabelSet.load(...))",
        )
    if labels is not None and labels.kind == "distances" and not isinstance(protocol.distillation, Distances):
        protocol = replace(protocol, distillation=Distances())
    if labels is not None:
        labels.require(synthetic)
        _check_labels(labels, protocol, mirror_safe=source.mirror_safe)
    if teachers is not None:
        require_teachers(teachers, synthetic)
    elif baselines:
        raise InvalidSetting(
            "teachers",
            None,
            f"a committee, of whom the real images of {', '.join(baselines)} are learned; or baselines=() without them",
        )
    _check_both(labels, teachers)
    if isinstance(protocol.distillation, Distances) and "whole" in baselines:
        raise InvalidSetting("baselines", baselines, "not the whole training set: distances are asked of small sets")
    return protocol, Teaching(synthetic, labels, teachers)


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
