"""Recovering images from teachers: what SRe2L, CDA and CV-DD share, an outer step among it.

An image set of ``ipc`` images per class is cut into independent problems: one image of each class of a chunk, for each
index below ipc. The images X of a problem are seen by frozen teachers k under one random view A per step, and both
their labels and what they make of the statistics of batch norms (`dsdistill.networks.measured`) are to fit::

    min_X  Σ_k w_k [ CE(f_k(A(X)), y) + α Σ_ℓ m_ℓ r_kℓ(A(X)) ]  (+ priors on X),     m_1 = 10, m_ℓ = 1 else

by Adam with betas (0.5, 0.9) and the step size lr/2 (1 + cos(π t/I)); after each step pixels are brought back to
[0, 1].

Several problems may pass as one batch: each has statistics, a view and a loss of its own, and Adam works by element, so
the result is theirs. One teacher after the other is differentiated, so the graph of the largest one is held, not all.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.augmentations import CropViews, ResizedCrop
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, Run, State
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Committee
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
from dsdistill.matching.patches import middling_mosaics
from dsdistill.objectives import total_variation
from dsdistill.parameterizations import Parameterization, Pixels


@dataclass(frozen=True)
class Problem:
    """One image for each of these classes; the ``index``-th of each."""

    index: int
    classes: tuple[int, ...]


class Voter(NamedTuple):
    """A teacher by its place in the committee, and the weight of its loss."""

    member: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class ByProblem(Fitting):
    """Images that are fitted problem by problem, by a vote of teachers: jobs, and the parts of an outer step."""

    def prepare(self, run: Run) -> None:
        measured(run, self.teachers)
        self.voters(run, 0)  # refuses a committee that does not fit, before any work

    def voters(self, run: Run, index: int) -> tuple[Voter, ...]:
        """The teachers that recover the images of one index, and their weights, 1 in sum.

        Raises:
            InvalidSetting: there are several, and the method takes one.
        """
        committee = Committee.of(run, self.teachers)
        if len(committee) > 1:
            names = ", ".join(teacher.name for teacher in committee)
            raise InvalidSetting("teachers", names, f"{type(self).__name__} takes one teacher; CVDD takes a committee")
        return (Voter(0, 1.0),)

    @abstractmethod
    def first_images(self, run: Run, problem: Problem) -> Tensor:
        """Where the images (B, C, H, W) of a problem start."""

    def jobs(self, run: Run) -> Sequence[Job]:
        made: list[list[Problem]] = []
        for index in range(self.ipc):
            for begin in range(0, len(run.classes), self.classes_together):
                problem = Problem(index, run.classes[begin : begin + self.classes_together])
                last = made[-1] if made else []
                if 0 < len(last) < self.problems_together and self._alike(run, last[0], problem):
                    last.append(problem)
                else:
                    made.append([problem])
        return [
            Job(
                group_key(key_of(group[0]), len(group)),
                tuple(sorted({label for one in group for label in one.classes})),
            )
            for group in made
        ]

    def _alike(self, run: Run, one: Problem, other: Problem) -> bool:
        same_size = len(one.classes) == len(other.classes)
        return same_size and self.voters(run, one.index) == self.voters(run, other.index)

    def problems(self, run: Run, key: str) -> list[Problem]:
        """Those of a job, by its key."""
        first, count = first_and_count(key)
        index, begin = map(int, first.split("-"))
        every, size = range(run.source.num_classes), self.classes_together
        chunks = -(-len(every) // size)
        places = range(index * chunks + begin // size, index * chunks + begin // size + count)
        return [
            Problem(place // chunks, tuple(every[place % chunks * size : (place % chunks + 1) * size]))
            for place in places
        ]

    def start(self, run: Run, job: Job) -> State:
        problems = self.problems(run, job.key)
        images = Pixels(torch.cat([self.first_images(run, one) for one in problems]).to(run.device))
        labels = HardLabels(torch.tensor([label for one in problems for label in one.classes]), run.source.num_classes)
        return State(images, labels, {"images": self._optimizer(images)})

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        problems = self.problems(run, run.rng.job)
        self._begin(state, iteration)
        images, owner, group = grouped(state.images, len(problems))
        views = self.views(run, iteration)
        shown = views.apply(images, drawn(views, run, problems, iteration), group)
        seen = sought(shown)
        classes = state.labels.classes[owner].to(run.device)
        found = torch.zeros(3, device=run.device)
        for voter in self.voters(run, problems[0].index):
            teacher = measured(run, self.teachers)[voter.member]
            found += self._differentiate(teacher, seen, classes, len(problems), voter.weight)
        priors = self._priors(images, len(problems))
        torch.autograd.backward([shown, *priors], [seen.grad, *(torch.ones_like(one) for one in priors)])
        self._update(run, state)
        return reported(found, len(problems))

    def _update(self, run: Run, state: State) -> None:
        """Move the images by their gradients, and bring them back to their range."""
        state.optimizers["images"].step()
        into_range(state.images, run.source)

    def _priors(self, images: Tensor, groups: int) -> list[Tensor]:
        """Terms in the images themselves, summed over problems."""
        return []


@dataclass(frozen=True, kw_only=True)
class Recovery(ByProblem):
    """What methods that recover images from teachers share: where images start, and priors on them."""

    total_variation: Annotated[float, Ge(0)] = 0.0
    """Weight of differences between neighbouring pixels."""
    l2: Annotated[float, Ge(0)] = 0.0
    """Weight of the mean norm of the images."""
    init: Literal["noise", "patches"] = "noise"
    """Where images start: from N(0, 1), or from mosaics of real patches of middling difficulty (SRe2L++, CV-DD)."""

    @abstractmethod
    def least_share(self, iteration: int) -> float:
        """What each paper has of its own: the smallest share of an image that a crop may be of."""

    def first_images(self, run: Run, problem: Problem) -> Tensor:
        rng = rng_of(run, problem)
        if self.init == "patches":
            return middling_mosaics(run, Committee.of(run, self.teachers)[0], problem.classes, problem.index)
        return torch.randn((len(problem.classes), *run.source.shape), generator=rng.at("init"), device=run.device)

    def _priors(self, images: Tensor, groups: int) -> list[Tensor]:
        terms = []
        if self.total_variation:
            parts = images.chunk(groups)
            terms.append(self.total_variation * torch.stack([total_variation(part) for part in parts]).sum())
        if self.l2:
            terms.append(self.l2 * images.flatten(1).norm(dim=1).sum() * (groups / len(images)))
        return terms


def key_of(problem: Problem) -> str:
    """Of a job: index and first class."""
    return f"{problem.index:04d}-{problem.classes[0]:05d}"


def rng_of(run: Run, problem: Problem) -> Rng:
    """Streams of a problem, whatever else passes with it."""
    return run.rng.scoped("").within(key_of(problem))


def drawn(views: ResizedCrop, run: Run, problems: Sequence[Problem], iteration: int) -> CropViews:
    """One view for each problem, from streams of its own."""
    return view_of_each(views, run, [rng_of(run, one) for one in problems], iteration)


def grouped(images: Parameterization, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded images (M, C, H, W), problem after problem, the stored item of each, and its problem (M,), on the CPU."""
    decoded, owner = images.decode()
    group = owner // (images.count // groups)
    if bool((group[1:] < group[:-1]).any()):  # forms that decode block after block
        order = torch.argsort(group, stable=True)
        decoded, owner, group = decoded[order.to(decoded.device)], owner[order], group[order]
    return decoded, owner, group


@torch.no_grad()
def into_range(images: Parameterization, source: ImageSource) -> None:
    """Bring standardised pixels back to what [0, 1] is in their units."""
    for pixels in images.parameters():
        mean, std = (
            torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1)
            for values in (source.normalization.mean, source.normalization.std)
        )
        torch.minimum(torch.maximum(pixels, -mean / std), (1 - mean) / std, out=pixels.data)
