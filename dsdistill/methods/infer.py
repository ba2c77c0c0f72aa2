"""INFER (Zhang et al., Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator,
arXiv 2408.06927), whose code calls it UFC, universal feature compensator.

A real image x of each class, and compensators u_1 .. u_M that all classes share, one for each of M teachers f_k, make
M + 1 images per class: x, x + u_1, ..., x + u_M. Of C classes the budget of IPC images takes::

    ipc₀ = ⌊ IPC / (M / C + 1) ⌋ real images of each class, and ipc₀ · M compensators

The compensators of an index i < ipc₀ are fitted to the i-th real images X of all classes, each alone, from u = 0 on::

    min_u  CE(f_k(A(X + u)), y) + α Σ_ℓ m_ℓ ( ‖m_ℓ(A(X + u)) − μ_ℓ‖₂ + ‖v_ℓ(A(X + u)) − σ²_ℓ‖₂ )

with m_1 = 10 and m_ℓ = 1 else, under one view A per step (a roll; crops and mirroring at 224 pixels), by Adam. Labels
are the mean logits of the teachers, of the whole images once (`relabel(kind="static")`, protocol "ufc_static"), or of
each view while a network learns ("ufc_dynamic").

Range of pixels: one u serves all classes, so x + u of every class stays in range only for u between the darkest and
the brightest class of each pixel, which leaves nearly nothing: u is not projected. Instead x + u is clipped, while u is
fitted and when the set is used (`Compensated`), so a teacher sees what networks will see. In the authors' code the
clipping is of a copy that is thrown away, and files clip what was fitted unclipped.

Other departures from the authors' code: the real images are drawn at random; the set is kept in its compact form, where
the code writes every sum as JPEG; the last iterate is kept, not the one before. All classes pass as one batch. Where
they are more than ``classes_together``, they pass in nearly equal parts whose statistics are their own, and whose
gradients add up: u stays that of all classes (the code would fit one for each part). For ShuffleNet of groups, which no
library has, ShuffleNetV2 stands in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, Preset, Run, State
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee, Teacher, Teachers
from dsdistill.labels import HardLabels
from dsdistill.matching.fitting import (
    Fitting,
    first_and_count,
    group_key,
    measured,
    reported,
    sought,
    view_of_each,
)
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Compensated

_CODE = "authors' code"
_SMALL = tuple(
    NetworkSpec(f"torchvision:{name}", stem="small")
    for name in ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0")
)
_LARGE = tuple(NetworkSpec(f"torchvision:{name}") for name in ("resnet18", "mobilenet_v2", "efficientnet_b0"))
_IMAGENET: dict[str, Any] = {"iterations": 2000, "statistics_weight": 0.01, "crop": True, "shift": 32}


@dataclass(frozen=True, kw_only=True)
class INFER(Fitting):
    """Inter-class feature compensators: real images, and a few additions to them that all classes share."""

    protocol: ClassVar[str] = "ufc_static"
    paper: ClassVar[str] = (
        "Zhang et al., Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator, "
        "ICLR 2025, arXiv 2408.06927"
    )
    alone: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar": Preset(f"{_CODE}, CIFAR-10 and CIFAR-100", {"shift": 4}),
        "imagenet": Preset(f"{_CODE}, ImageNet-1K", {**_IMAGENET, "teachers": Teachers(networks=_LARGE)}),
    }

    ipc: Annotated[int, Ge(1)] = 10
    """Budget per class, in images: real images and compensators together are no more."""
    compensators: Annotated[int, Ge(0)] | None = None
    """M, the first so many teachers have a compensator each; null: all of them. With 0 the set is real images."""
    iterations: Annotated[int, Ge(1)] = 1000
    """Steps for each compensator."""
    statistics_weight: Annotated[float, Ge(0)] = 1.0
    """α, weight of the distances of batch statistics."""
    classes_together: Annotated[int, Ge(1)] = 1000
    """Classes that share a batch, hence its statistics; more pass in parts, and still share their compensators."""
    problems_together: Annotated[int, Ge(1)] = 1
    """Image indices that pass as one batch, each with statistics of its own; more fill a GPU, and change nothing but
    rounding."""
    crop: bool = False
    """Views are random crops, resized, and mirrored where that is safe."""
    teachers: Teachers = Teachers(networks=_SMALL)
    """Networks trained on the real images, each of which has a compensator for each index."""

    @property
    def steps(self) -> int:
        return 0 if self.compensators == 0 else self.iterations

    def check(self, source: ImageSource) -> None:
        """Refuse what `Fitting.check` refuses, a budget below one real image, and classes too small for theirs.

        Raises:
            BadData, InvalidSetting: naming the place and the mend.
        """
        super().check(source)
        # How many teachers a folder has is known once it is opened; `prepare` asks again.
        count = 1 if self.teachers.folder is not None else len(self.teachers.networks)
        if self.teachers.folder is None and (self.compensators or 0) > count:
            raise self._too_few(count)
        self._check_budget(source, count if self.compensators is None else self.compensators)

    def _check_budget(self, source: ImageSource, compensators: int) -> None:
        need = real_per_class(self.ipc, source.num_classes, compensators)
        if need < 1:
            least = -(-(source.num_classes + compensators) // source.num_classes)
            raise InvalidSetting(
                "INFER.ipc",
                self.ipc,
                f"at least {least}: one real image of each of {source.num_classes} classes, and {compensators} "
                "compensators",
            )
        small = [f"{name!r} ({n})" for name, n in zip(source.classes, source.counts, strict=True) if n < need]
        if small:
            raise BadData(
                f"{len(small)} classes of {source.name!r} have fewer than the {need} real images that ipc={self.ipc} "
                f"takes: {', '.join(small[:5])}; lower ipc"
            )

    def _too_few(self, count: int) -> InvalidSetting:
        return InvalidSetting("INFER.compensators", self.compensators, f"at most {count}, one for each teacher")

    def asked(self, run: Run) -> Sequence[Teacher]:
        """Those with a compensator."""
        return () if self.compensators == 0 else Committee.of(run, self.teachers)[: self.compensators]

    def prepare(self, run: Run) -> None:
        if self.compensators == 0:
            return
        committee = Committee.of(run, self.teachers)
        if (self.compensators or 0) > len(committee):
            raise self._too_few(len(committee))
        self._check_budget(run.source, self._each(run))
        measured(run, self.teachers)

    def _each(self, run: Run) -> int:
        """M. The teachers themselves are not needed unless a folder has to be asked how many it has."""
        if self.compensators is not None:
            return self.compensators
        folder = self.teachers.folder is not None
        return len(Committee.of(run, self.teachers)) if folder else len(self.teachers.networks)

    def jobs(self, run: Run) -> Sequence[Job]:
        every = range(real_per_class(self.ipc, run.source.num_classes, self._each(run)))
        size = self.problems_together
        parts = [every[begin : begin + size] for begin in range(0, len(every), size)]
        return [Job(group_key(f"{part[0]:04d}", len(part)), run.classes) for part in parts]

    def start(self, run: Run, job: Job) -> State:
        source, indices = run.source, _indices(job.key)
        each = self._each(run)
        count = real_per_class(self.ipc, source.num_classes, each)
        drawn = source.per_class_indices(run.classes, count, run.rng.scoped("").at("anchors"))
        rows = drawn.view(len(run.classes), count).T[indices]
        standardize, (channels, _, _) = source.normalization.standardize, source.shape
        images = Compensated(
            source.gather(rows.flatten()),
            torch.zeros(len(indices), each, *source.shape, device=run.device),
            torch.arange(len(indices)).repeat_interleave(len(run.classes)),
            standardize(torch.zeros(channels, 1, 1)).flatten().tolist(),
            standardize(torch.ones(channels, 1, 1)).flatten().tolist(),
        )
        labels = HardLabels(torch.tensor(run.classes).repeat(len(indices)), source.num_classes)
        return State(images, labels, {"images": self._optimizer(images)} if each else {})

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        indices, each = _indices(run.rng.job), self._each(run)
        optimizer, views = self._begin(state, iteration), self.views(run, iteration)
        images, owner = state.images.decode()
        leaf = images.detach().requires_grad_()
        anchors = state.images.count // len(indices)
        block = torch.arange(len(owner)) // (len(owner) // state.images.blocks) % (1 + each)
        found = torch.zeros(3, device=run.device)
        for place in range(each):
            teacher = measured(run, self.teachers)[place]
            streams = [run.rng.scoped("").within(f"index {index}", place) for index in indices]
            record = view_of_each(views, run, streams, iteration)
            own = (block == 1 + place).nonzero().flatten()
            for rows in self._parts(own, owner, anchors):
                shown = views.apply(leaf[rows.to(run.device)], record, owner[rows] // anchors)
                seen, classes = sought(shown), state.labels.classes[owner[rows]].to(run.device)
                found += self._differentiate(teacher, seen, classes, len(indices), len(rows) / len(own))
                shown.backward(seen.grad)  # type: ignore[no-untyped-call]
        images.backward(leaf.grad)  # type: ignore[no-untyped-call]
        optimizer.step()
        return reported(found, len(indices) * each)

    def _parts(self, rows: Tensor, owner: Tensor, anchors: int) -> list[Tensor]:
        """Rows that pass together, index after index; each part has as many of every index as of the others."""
        rows = rows[torch.argsort(owner[rows] // anchors, stable=True)]
        number = -(-anchors // self.classes_together)
        if number == 1:
            return [rows]
        part = torch.arange(anchors) * number // anchors
        return [rows[part[owner[rows] % anchors] == which] for which in range(number)]


def real_per_class(ipc: int, num_classes: int, compensators: int) -> int:
    """ipc₀: real images of each class that leave room for as many times ``compensators`` in a budget of ``ipc``."""
    return ipc * num_classes // (num_classes + compensators)


def _indices(key: str) -> list[int]:
    """Those of a job, by its key."""
    first, count = first_and_count(key)
    return list(range(int(first), int(first) + count))
