"""Difficulty-aligned trajectory matching (Guo et al., Towards Lossless Dataset Distillation via Difficulty-Aligned
Trajectory Matching, arXiv 2310.05773).

Early segments of an expert's trajectory teach what is easy, late ones what is hard. Few images can hold only the easy
part; many images do worse than random real ones unless they match late segments. So the window of start epochs goes
with the budget, and may grow while the images learn (T, M, β and θ* as in `dsdistill.methods.mtt`)::

    t ~ U{ T⁻, …, U(it) − 1 },     U(it) = min( T⁺, T₀ + ⌊ (T⁺ − T₀) it / grown ⌋ )

    min_{S, Y, β}  E  ‖ θ_T − θ*_{t+M} ‖² / ‖ θ*_t − θ*_{t+M} ‖²,     ℓ = − Σ_k softmax(Y)_k log softmax(f_θ(S))_k

Experts are flat (`FlatTraining`, as for FTD). S starts from real images that an expert classifies correctly; the logits
Y of each start as the mean over all experts that classify it correctly, and are learned with S. An update is skipped
where the loss is above ``guard`` or not a number: steps too large for their segment would only do harm.

Departures from the authors' code: experts are those of the last epoch that is looked at, where the code takes the last
of all. A class of which no expert classifies enough images correctly is filled with those that come nearest, where the
code never ends; an image that no expert gets right starts from the mean of all of them, where it divides by zero. A run
all of whose updates are skipped is stopped. The moving average that its settings name, and no line of it uses, is left
out.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, Preset, Run, State
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Experts, FlatTraining, Trajectories
from dsdistill.labels import Labels, SoftLabels
from dsdistill.matching.trajectory import TrajectoryMatching, distance, published
from dsdistill.networks import Outer
from dsdistill.parameterizations import Parameterization
from dsdistill.selection import class_outputs, image_outputs

logger = logging.getLogger("dsdistill")
_SETTINGS = "settings files of the authors' code; images loaded with zca='unit'"


def _with(
    low: int, first: int | None, grown: int | None, batch_size: int | None, lr_labels: float, **more: Any
) -> dict[str, Any]:
    window = {"min_start_epoch": low, "first_max_start_epoch": first, "grown": grown}
    return {**window, "batch_size": batch_size, "lr_labels": lr_labels, **more}


@dataclass(frozen=True, kw_only=True)
class DATM(TrajectoryMatching):
    """Difficulty alignment: a window of epochs that suits the budget and may grow, and learned soft labels."""

    paper: ClassVar[str] = (
        "Guo et al., Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching, ICLR 2024, "
        "arXiv 2310.05773"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar10/ipc1": Preset(_SETTINGS, published(1, 80, 4, 100.0, 1e-7, **_with(0, None, None, 10, 5.0, guard=1.1))),
        "cifar10/ipc10": Preset(_SETTINGS, published(10, 80, 20, 100.0, 1e-5, **_with(0, 10, 1000, 100, 2.0))),
        "cifar10/ipc50": Preset(_SETTINGS, published(50, 80, 40, 1000.0, 1e-5, **_with(0, 20, 2000, 500, 2.0))),
        "cifar10/ipc500": Preset(_SETTINGS, published(500, 40, 60, 50.0, 1e-5, **_with(40, None, None, 1000, 10.0))),
        "cifar10/ipc1000": Preset(_SETTINGS, published(1000, 100, 60, 50.0, 1e-5, **_with(40, None, None, 1000, 10.0))),
        "cifar100/ipc1": Preset(
            _SETTINGS, published(1, 40, 20, 1000.0, 1e-5, **_with(0, 10, 1000, None, 10.0, expert_epochs=3))
        ),
        "cifar100/ipc10": Preset(_SETTINGS, published(10, 80, 50, 1000.0, 1e-5, **_with(0, 30, 2000, 1000, 10.0))),
        "cifar100/ipc50": Preset(
            _SETTINGS, published(50, 80, 70, 1000.0, 1e-5, **_with(20, None, None, 1000, 10.0, init="random"))
        ),
        "cifar100/ipc100": Preset(_SETTINGS, published(100, 80, 70, 50.0, 1e-5, **_with(30, None, None, 1000, 10.0))),
        "tiny_imagenet/ipc1": Preset(_SETTINGS, published(1, 40, 20, 10_000.0, 1e-4, **_with(0, 15, 2000, None, 10.0))),
        "tiny_imagenet/ipc10": Preset(
            _SETTINGS, published(10, 40, 50, 100.0, 1e-4, **_with(10, None, None, 500, 10.0))
        ),
        "tiny_imagenet/ipc50": Preset(
            _SETTINGS, published(50, 20, 70, 100.0, 1e-4, **_with(40, None, None, 1000, 10.0))
        ),
    }

    iterations: Annotated[int, Ge(1)] = 10_000
    """Outer steps."""
    student_steps: Annotated[int, Ge(1)] = 80
    """T, steps of the student."""
    first_max_start_epoch: Annotated[int, Ge(1)] | None = None
    """T₀, where the window of start epochs ends at first; null: at max_start_epoch all the time."""
    grown: Annotated[int, Ge(1)] | None = None
    """Steps after which it has grown to max_start_epoch; null: half of all."""
    experts: Experts = Experts(training=FlatTraining(epochs=100, alpha=0.3))
    """Networks trained on the real images: how many, and how."""
    init: Literal["correct", "random"] = "correct"
    """Which real images S starts from: those that an expert classifies correctly, or any, whose labels then start from
    the logits of one expert."""
    labels: Literal["hard", "soft"] = "soft"
    """Labels learned together with the images, or fixed to the class."""
    guard: Annotated[float, Gt(0)] = 1.0
    """Loss above which an update is skipped; 1 is that of a student that stands still."""
    patience: Annotated[int, Ge(1)] = 200
    """Updates skipped in a row after which the run is stopped."""

    def check(self, source: ImageSource) -> None:
        """Refuse a window that begins outside its bounds, and what `TrajectoryMatching.check` refuses.

        Raises:
            BadData, InvalidSetting: see there.
        """
        super().check(source)
        first = self.first_max_start_epoch
        if first is not None and not self.min_start_epoch < first <= self.max_start_epoch:
            allowed = f"above min_start_epoch={self.min_start_epoch}, up to max_start_epoch={self.max_start_epoch}"
            raise InvalidSetting("DATM.first_max_start_epoch", first, allowed)

    def start(self, run: Run, job: Job) -> State:
        trajectories, last = self.trajectories(run), self.last_epoch
        if self.init == "correct":
            chosen = correct_images(run, trajectories, last, self.form.images_per_class(self.ipc))
            images, labels = self.made_of(run, chosen)
        else:
            images, labels = self.random_real(run)
        state = self.begin(run, images, labels)
        if isinstance(state.labels, SoftLabels):
            experts = range(trajectories.count if self.init == "correct" else 1)
            with torch.no_grad():
                state.labels.logits.copy_(agreed_logits(run, trajectories, last, experts, images, labels))
        state.extras["skipped"] = torch.zeros((), dtype=torch.int64)
        return state

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        segment = self.segment(run, iteration, self.window_end(iteration))
        start, target = segment.after(0, self.expert_epochs)
        outer = Outer(lambda ends: distance(ends[0], start, target), (self.student_steps,))
        loss = self.follow(run, state, iteration, start, outer)
        harmless = bool(loss <= self.guard)  # false where it is no number
        if harmless:
            self.update(state)
        self._count(state, iteration, harmless, loss)
        told = {**self.told(state, segment, loss), "skipped": torch.tensor(float(not harmless))}
        return told if bool(torch.isfinite(loss)) else {name: told[name] for name in told if name != "loss"}

    def window_end(self, iteration: int) -> int:
        """U(it): start epochs lie below."""
        first, high = self.first_max_start_epoch, self.max_start_epoch
        if first is None:
            return high
        return min(high, first + (high - first) * iteration // (self.grown or max(1, self.iterations // 2)))

    def _count(self, state: State, iteration: int, harmless: bool, loss: Tensor) -> None:
        skipped = state.extras["skipped"]
        skipped.copy_(torch.zeros_like(skipped) if harmless else skipped + 1)
        if int(skipped) >= self.patience:
            raise InvalidSetting(
                "DATM.guard",
                self.guard,
                f"the last {self.patience} updates were skipped, as the loss stays above it ({float(loss):.3g} in "
                f"iteration {iteration}): lower lr_student or student_steps, raise min_start_epoch, or raise it",
            )


@torch.no_grad()
def correct_images(run: Run, trajectories: Trajectories, epoch: int, need: int) -> list[Tensor]:
    """Storage indices of up to ``need`` images of each class that an expert classifies correctly, in random order.

    Experts are asked in random order, each about all images, until there are enough of each class. What they cannot
    fill is filled by the images that come nearest, which is said in the log.
    """
    order = torch.randperm(trajectories.count, generator=run.rng.at("init/experts", device="cpu")).tolist()
    goals = [min(need, run.source.counts[label]) for label in run.classes]
    draw = run.rng.at("init", device="cpu")
    mixed = [torch.randperm(run.source.counts[label], generator=draw).to(run.device) for label in run.classes]
    margins = [torch.full((len(rows),), -torch.inf, device=run.device) for rows in mixed]
    for expert in order:
        theta = trajectories.snapshots(expert, [epoch])[0]
        logits = class_outputs(run, partial(trajectories.network, theta))
        for place, (label, found) in enumerate(zip(run.classes, logits, strict=True)):
            margins[place] = torch.maximum(margins[place], _margin(found, label)[mixed[place]])
        parts = zip(run.classes, margins, goals, strict=True)
        short = [label for label, margin, goal in parts if (margin > 0).sum() < goal]
        if not short:
            break
    if short:
        names = [run.source.classes[label] for label in short]
        logger.warning("no expert classifies %d images of %s correctly: the nearest serve too", need, names)
    # Correct ones in their random order, then the others by how little is missing.
    best = [torch.argsort((-one).clamp_min(0), stable=True)[:need] for one in margins]
    return [run.source.offsets[c] + rows[kept] for c, rows, kept in zip(run.classes, mixed, best, strict=True)]


def _margin(logits: Tensor, label: int) -> Tensor:
    """By how much (n,) the logit of the class exceeds the largest of the others; above 0 where it is predicted."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.amax(1)


@torch.no_grad()
def agreed_logits(
    run: Run,
    trajectories: Trajectories,
    epoch: int,
    experts: Iterable[int],
    images: Parameterization,
    labels: Labels,
) -> Tensor:
    """Logits (N, K) of stored images: the mean over the experts that are right, over all of them where none is.

    An item that decodes to several images gets the mean of theirs.
    """
    shown, owner = images.to(run.device).decode()
    classes = labels.classes[owner].to(run.device)
    of_right, of_all = torch.zeros(2, len(shown), labels.num_classes, device=run.device)
    right_count, count = torch.zeros(len(shown), 1, device=run.device), 0
    for expert in experts:
        theta = trajectories.snapshots(expert, [epoch])[0]
        logits = image_outputs(run, partial(trajectories.network, theta), shown)
        right = (logits.argmax(1) == classes)[:, None]
        of_right += logits * right
        of_all += logits
        right_count += right
        count += 1
    each = torch.where(right_count > 0, of_right / right_count.clamp_min(1), of_all / count)
    total = each.new_zeros(images.count, each.shape[1]).index_add_(0, owner.to(run.device), each)
    return (total / images.multiplicity[:, None].to(run.device)).cpu()
