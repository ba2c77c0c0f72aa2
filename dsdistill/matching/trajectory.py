"""Matching training trajectories, on a page (Cazenavette et al., arXiv 2203.11932, whose form all of the line keep)::

    repeat:
        draw an expert and an epoch t of T⁻ .. T⁺ − 1;  θ_0 = θ*_t,  θ* = θ*_{t+M}        trained on real images
        for i = 0 .. T − 1:  θ_{i+1} = θ_i − β ∇_θ ℓ(θ_i; A_i(S_i))                       S_i: b synthetic images
        L = ‖θ_T − θ*‖² / ‖θ_0 − θ*‖²
        S ← S − lr_images ∂L/∂S,   β ← β − lr_lr ∂L/∂β                                    SGD

L = 1 is a student that stands still. What FTD, AST and DATM change is in their files; experts are in
`dsdistill.experts`, the derivative of the unroll in `dsdistill.networks.functional`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from dsdistill.augmentations import Augmentation, Siamese
from dsdistill.data import ImageSource
from dsdistill.engine import Metrics, PerClass, Run, State
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.exchange.arrays import LEARNED_LR
from dsdistill.experts import Experts, Trajectories
from dsdistill.labels import HardLabels, Labels, SoftLabels
from dsdistill.networks import Backward, Need, NetworkSpec, Outer, Student, backpropagate, has_batchnorm
from dsdistill.networks.rules import SGD, Rule
from dsdistill.parameterizations import Parameterization, places_of
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
_PLAIN = SGD()


class StepSize(nn.Module):
    """The student's step size β, learned and positive: β = r down to its start β₀, and β₀ / (2 − r/β₀) below.

    In the authors' code β = r, which may become negative; the published step sizes of r hold here, as slope and value
    are the same at the start and above. Far below β falls off as β₀² / |r|, slowly enough to find its way back.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.raw = nn.Parameter(torch.tensor(float(initial)))

    def forward(self) -> Tensor:
        """β, a scalar."""
        below = self.initial / (2 - (self.raw / self.initial).clamp_max(1))
        return torch.where(self.raw >= self.initial, self.raw, below)


def published(
    ipc: int, student_steps: int, max_start_epoch: int, lr_images: float, lr_lr: float, **more: Any
) -> dict[str, Any]:
    """Settings of a row of the papers' tables: budget, T, T⁺, step sizes on images and on β, and what else it says."""
    return {
        "ipc": ipc,
        "student_steps": student_steps,
        "max_start_epoch": max_start_epoch,
        "lr_images": lr_images,
        "lr_lr": lr_lr,
        **more,
    }


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's trajectory, from the epoch after which the student starts."""

    trajectories: Trajectories
    expert: int
    epoch: int
    settings: Experts

    def after(self, *epochs: int) -> Sequence[Tensor]:
        """The expert's parameters (P,) so many epochs after the start; 0 is the start.

        Raises:
            InvalidSetting: the first are the same as others, so that `distance` has nothing to be measured by.
        """
        numbers = [self.epoch + more for more in epochs]
        found = self.trajectories.snapshots(self.expert, numbers)
        gaps = (found[1:] - found[0]).square().sum(1).tolist()
        if 0 in gaps:
            raise self._standstill(numbers[0], numbers[1 + gaps.index(0)])
        return found.unbind()

    def _standstill(self, epoch: int, later: int) -> InvalidSetting:
        settings, lr = self.settings, self.settings.training.lr
        told = f"expert {self.expert} is stored with the same parameters after epochs {epoch} and {later}"
        if settings.precision == "float32":
            return InvalidSetting("experts.training.lr", lr, f"{told}: raise it")
        mend = f"{told}: take 'float32', which tells smaller steps apart, or raise experts.training.lr = {lr}"
        return InvalidSetting("experts.precision", settings.precision, mend)


def distance(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """‖end − target‖² / ‖start − target‖², a scalar, of vectors (P,)."""
    return (end - target).square().sum() / (start - target).square().sum()


def mini_batches(count: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Items of each of ``steps`` mini-batches: all are shuffled, cut and used up, then shuffled again.

    A rest smaller than ``size`` comes first of its pass, as in the authors' code.
    """
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += reversed(torch.split(torch.randperm(count, generator=generator), size))
    return batches[:steps]


@dataclass(frozen=True, kw_only=True)
class TrajectoryMatching(PerClass):
    """What MTT, FTD, AST and DATM share: settings, and the parts of an outer step."""

    network_needs: ClassVar[tuple[Need, ...]] = ("second-order", "deterministic")

    iterations: Annotated[int, Ge(1)] = 5000
    """Outer steps."""
    student_steps: Annotated[int, Ge(1)] = 30
    """T, steps of the student."""
    expert_epochs: Annotated[int, Ge(1)] = 2
    """M, epochs of the expert that the student is to cover."""
    min_start_epoch: Annotated[int, Ge(0)] = 0
    """T⁻, first epoch of experts that a student starts from; 0 is before training."""
    max_start_epoch: Annotated[int, Ge(1)] = 20
    """T⁺, the first one that it does not start from any more."""
    batch_size: Annotated[int, Ge(1)] | None = None
    """b, stored images per step of the student; null: all."""
    lr_images: Annotated[float, Gt(0)] = 100.0
    """SGD step size on standardised (or whitened) pixels; the loss has no unit, hence its size."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of the SGD on pixels and on the student's step size."""
    lr_student: Annotated[float, Gt(0)] = 0.01
    """β₀, the student's step size at the start."""
    lr_lr: Annotated[float, Ge(0)] = 1e-5
    """SGD step size on the student's step size; 0 keeps it."""
    labels: Literal["hard", "soft"] = "hard"
    """Labels fixed to the class, or probabilities learned together with the images."""
    lr_labels: Annotated[float, Gt(0)] = 2.0
    """SGD step size on the logits of soft labels; not used for hard ones."""
    momentum_labels: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of that SGD."""
    network: NetworkSpec = NetworkSpec()
    """Network of experts and students."""
    augmentation: Augmentation | None = Siamese()
    """Views of the student's mini-batches, drawn for each image; flips are left out where they change the class."""
    experts: Experts = Experts()
    """Networks trained on the real images: how many, and how."""
    backward: Backward = "sweep"
    """How the student's steps are differentiated: exactly in constant memory (sweep, forward, compiled) or by the whole
    graph (unroll), or as TESLA does (truncated)."""

    @property
    def steps(self) -> int:
        return self.iterations

    @property
    def last_epoch(self) -> int:
        """The last epoch of experts that is looked at."""
        return self.max_start_epoch - 1 + self.expert_epochs

    @property
    def student_momentum(self) -> float:
        """Momentum of the student's steps."""
        return 0.0

    def check(self, source: ImageSource) -> None:
        """Refuse windows that experts do not reach, a single class, and what `PerClass.check` refuses.

        Raises:
            BadData, InvalidSetting: see there.
        """
        super().check(source)
        name = type(self).__name__
        if self.min_start_epoch >= self.max_start_epoch:
            allowed = f"below max_start_epoch={self.max_start_epoch}"
            raise InvalidSetting(f"{name}.min_start_epoch", self.min_start_epoch, allowed)
        if self.last_epoch > self.experts.training.epochs:
            raise InvalidSetting(
                f"{name}.max_start_epoch",
                self.max_start_epoch,
                f"students are led up to epoch {self.last_epoch} (max_start_epoch - 1 + expert_epochs), and experts "
                f"are trained for {self.experts.training.epochs}: lower it, or raise experts.training.epochs",
            )
        if source.num_classes < 2:
            raise BadData(
                f"{name} follows the training of a classifier, and {source.name!r} has one class: give two or more"
            )

    def prepare(self, run: Run) -> None:
        """Find or train the experts; says so where students cannot follow them by the steps that they make."""
        momentum = self.experts.training.momentum
        if momentum != self.student_momentum and run.shared.rehearsal is None:  # which prepares several times
            logger.warning(
                "%s: experts.training.momentum = %g, and the student's momentum is %g: it can hardly follow them",
                type(self).__name__,
                momentum,
                self.student_momentum,
            )
        self.trajectories(run)

    def trajectories(self, run: Run) -> Trajectories:
        """The experts, trained at the first call unless they are there."""
        return Trajectories.of(run, self.experts, self.network, self.last_epoch)

    def begin(self, run: Run, images: Parameterization, labels: Labels) -> State:
        """The state that all start from: images, labels, β, and their optimisers."""
        rate = StepSize(self.lr_student).to(run.device)
        optimizers: dict[str, torch.optim.Optimizer] = {
            "images": torch.optim.SGD(images.parameters(), lr=self.lr_images, momentum=self.momentum),
            "lr": torch.optim.SGD(rate.parameters(), lr=self.lr_lr, momentum=self.momentum),
        }
        if self.labels == "soft" and isinstance(labels, HardLabels):
            labels = SoftLabels.from_hard(labels)
        if isinstance(labels, SoftLabels):
            optimizers["labels"] = torch.optim.SGD(
                labels.parameters(), lr=self.lr_labels, momentum=self.momentum_labels
            )
        return State(images, labels, optimizers, {"lr": rate})

    def segment(self, run: Run, iteration: int, end: int | None = None) -> Segment:
        """Of the next expert, each being used once before any is used again; starts lie below ``end``, or T⁺."""
        trajectories = self.trajectories(run)
        turn, place = divmod(iteration, trajectories.count)
        order = torch.randperm(trajectories.count, generator=run.rng.at("experts", turn, device="cpu"))
        low, high = self.min_start_epoch, self.max_start_epoch if end is None else end
        start = torch.randint(low, high, (), generator=run.rng.at("start", iteration, device="cpu"))
        return Segment(trajectories, int(order[place]), int(start), self.experts)

    def follow(
        self,
        run: Run,
        state: State,
        iteration: int,
        start: Tensor,
        outer: Outer,
        *,
        rule: Rule = _PLAIN,
        factor: float = 1.0,
    ) -> Tensor:
        """Train a student from ``start`` on the synthetic images; the outer loss, whose gradients are left behind.

        Args:
            start: θ_0 (P,).
            outer: the loss of the student's parameters after some of its steps.
            rule: of its steps, with step size β.
            factor: of its loss.
        """
        for optimizer in state.optimizers.values():
            optimizer.zero_grad()
        images, owner = state.images.decode()
        targets = state.labels.target(owner)
        network = self.trajectories(run).network
        views = self.augmentation.suited(run.source.mirror_safe) if self.augmentation else None
        drawn = run.rng.at("views", iteration, device="cpu")
        places = places_of(owner, state.images.multiplicity, images.device)
        count = state.images.count
        items = mini_batches(
            count, self.batch_size or count, self.student_steps, run.rng.at("batches", iteration, device="cpu")
        )
        rows = [places(batch) for batch in items]
        shape, records = run.source.shape, []
        if views is not None:
            records = [views.sample(len(one), shape, drawn, per="image", device=run.device) for one in rows]

        def show(step: int, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            shown = images.index_select(0, rows[step])
            if views is not None:
                shown = views.apply(shown, records[step])
            return shown, targets.index_select(0, rows[step])

        # Several activations of each image are held while gradients are differentiated.
        chunk = None if has_batchnorm(network.module) else max(1, run.chunk // 2)
        student = Student(network, show, self.student_steps, rule, factor, chunk)
        return backpropagate(student, outer, start, state.extras["lr"](), images, targets, self.backward).loss

    def update(self, state: State) -> None:
        """Step everything that is learned along what `follow` left behind."""
        for optimizer in state.optimizers.values():
            optimizer.step()
        state.images.constrain()

    def told(self, state: State, segment: Segment, loss: Tensor) -> Metrics:
        """What a step reports: a loss means little without the step size and the epoch that it belongs to."""
        return {"loss": loss, "lr": state.extras["lr"]().detach(), "start_epoch": torch.tensor(float(segment.epoch))}

    def finish(self, run: Run, state: State) -> SyntheticDataset:
        """The set, with the learned step size, which networks are best trained with."""
        made = super().finish(run, state)
        return replace(made, learned={LEARNED_LR: state.extras["lr"]().detach().cpu()})
