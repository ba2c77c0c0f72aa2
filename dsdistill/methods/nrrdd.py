"""NRR-DD (Tran et al., Enhancing Dataset Distillation via Non-Critical Region Refinement, arXiv 2503.18267).

What makes a class is kept as it is in real images, and only the rest is refined.

Initial images: of a pool of real images of class y, each gives random crops. With C(x) in [0, 1] the class activation
map of the teacher f (`dsdistill.matching.activation`), those t crops of an image that hold most of the mass of its map
are critical; of those whose class f gives at least `trusted`, the one that f recognises *least* is taken (RDED takes
the one it recognises best), and of the pool the f² · IPC least recognised ones make the mosaics, f x f to each. Where f
gives every crop of an image less, its best one comes after all others: it shows something else, and would teach it
under this class.

Refinement: the map of each mosaic, made once, says what may change, and how far::

    M = max(0, ε − C(x)),     x ← x − M ⊙ Δ,     Δ = Adam's update for CE(f(A(x)), y) + α Σ_ℓ m_ℓ r_ℓ(A(x))

with the loss of SRe2L under a view A. The update is multiplied, not the gradient, out of which Adam would divide the
mask again. Where C(x) ≥ ε a pixel stays to the last bit.

Labels: of each mixed view two distances to its classes, in place of all probabilities
(`relabel(kind="distances")`, `dsdistill.relabelling.Distances`).

The authors' constants were not at hand. Inferred are all of: ``threshold`` (ε), ``critical`` (t), ``crops``, ``pool``,
``factor`` (f, as in RDED), the order of choice, α with m_1 = 10 (as in SRe2L), ``iterations``,
``lr_images``, and the views (those of SRe2L at larger sizes). They are settings. ``trusted`` is ours, a departure: with
0 the choice is as summaries of the paper tell it, and with teachers that give nearly no crop so much it is RDED's.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from dsdistill.augmentations import ResizedCrop
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run, Shared, State
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Teacher
from dsdistill.matching.activation import activation_maps, last_maps, share_inside
from dsdistill.matching.patches import POOL, Patches, cut, factor_of, mosaics, patch_losses
from dsdistill.matching.recovery import ByProblem, Problem, into_range


@dataclass(frozen=True, kw_only=True)
class NRRDD(ByProblem):
    """Non-critical region refinement: mosaics of telling real patches, refined where the class is not seen."""

    protocol: ClassVar[str] = "rethinking_soft"
    paper: ClassVar[str] = (
        "Tran et al., Enhancing Dataset Distillation via Non-Critical Region Refinement, CVPR 2025, arXiv 2503.18267"
    )

    iterations: Annotated[int, Ge(1)] = 1000
    """Steps of refinement (inferred)."""
    lr_images: Annotated[float, Gt(0)] = 0.1
    """Step size of Adam on standardised pixels, which falls to 0 along half a cosine (inferred)."""
    threshold: Annotated[float, Ge(0)] = 0.5
    """ε: a pixel moves by ε less its activation, in [0, 1], times what Adam would have it move (inferred)."""
    factor: Annotated[int, Ge(1)] | None = None
    """f, patches along each side of an image; null: 2 from 128 pixels on, else 1 (inferred)."""
    pool: Annotated[int, Ge(1)] = POOL
    """Random real images of each class that patches are cut out of (inferred)."""
    crops: Annotated[int, Ge(1)] = 20
    """Random crops of each of them (inferred)."""
    critical: Annotated[int, Ge(1)] = 5
    """t, crops of each image that are kept for how much of its activation they hold (inferred)."""
    trusted: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Least probability of its class for a patch not to come last; 0 for whatever is recognised least (ours)."""

    def check(self, source: ImageSource) -> None:
        """Refuse what `ByProblem.check` refuses, and classes and pools with too few images for so many patches.

        Raises:
            BadData, InvalidSetting: naming the place and the mend.
        """
        super().check(source)
        if self.critical > self.crops:
            raise InvalidSetting("NRRDD.critical", self.critical, f"at most the {self.crops} crops of an image")
        need = self.ipc * self._factor(source) ** 2
        if self.pool < need:
            raise InvalidSetting("NRRDD.pool", self.pool, f"at least {need}, a patch of its own for each cell")
        small = [f"{name!r} ({n})" for name, n in zip(source.classes, source.counts, strict=True) if n < need]
        if small:
            raise BadData(
                f"{len(small)} classes of {source.name!r} have fewer than the {need} images that ipc={self.ipc} takes "
                f"patches of: {', '.join(small[:5])}; lower ipc or factor"
            )
        for spec in self.teachers.networks:
            seed = torch.Generator().manual_seed(0)
            last_maps(
                spec.build(source.shape, source.num_classes, generator=seed, device="cpu"), source.shape, spec.name
            )

    def _factor(self, source: ImageSource) -> int:
        return factor_of(source.shape) if self.factor is None else self.factor

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        teacher = self.asked(run)[0]
        last_maps(teacher.network, run.source.shape, teacher.name)

    def first_images(self, run: Run, problem: Problem) -> Tensor:
        factor, shape = self._factor(run.source), run.source.shape
        size = (shape[1] // factor, shape[2] // factor)
        places = problem.index + self.ipc * torch.arange(factor**2)
        cells: list[list[Tensor]] = [[] for _ in places]
        for label in problem.classes:
            chosen = self._patches(run, label).take(places)
            for cell, patch in zip(cells, cut(run, chosen.rows, chosen.boxes, size), strict=True):
                cell.append(patch)
        return mosaics([torch.stack(cell) for cell in cells], shape)

    def _patches(self, run: Run, label: int) -> Patches:
        known = _known.setdefault(run.shared, {})
        if (self, label) not in known:
            known[self, label] = self.critical_patches(run, self.asked(run)[0], label)
        return known[self, label]

    @torch.no_grad()
    def critical_patches(self, run: Run, teacher: Teacher, label: int) -> Patches:
        """The patch of each image of a pool of one class: trusted ones first, those recognised least before others."""
        rng, shape = run.rng.scoped("").within("critical", label), run.source.shape
        factor = self._factor(run.source)
        rows = run.source.per_class_indices([label], self.pool, rng.at("pool"))
        views = ResizedCrop(scale=(0.08, 1.0), ratio=(1.0, 1.0), flip=0.0)
        drawn = views.sample(len(rows) * self.crops, shape, rng.at("crops", device="cpu"), per="image").boxes
        boxes = drawn.view(len(rows), self.crops, 4)
        shares = torch.cat(
            [
                share_inside(maps_of(run, teacher, run.source.gather(part), torch.full((len(part),), label)), held)
                for part, held in zip(torch.split(rows, run.chunk), torch.split(boxes, run.chunk), strict=True)
            ]
        )
        best = torch.argsort(shares, dim=1, descending=True, stable=True)[:, : self.critical]
        every = torch.arange(len(rows))[:, None]
        kept = boxes[every, best]
        size = (shape[1] // factor, shape[2] // factor)
        repeated = rows.repeat_interleave(self.critical)
        losses = patch_losses(run, teacher, label, repeated, kept.flatten(0, 1), size).view(-1, self.critical)
        places = self._places(losses)
        chosen = places.argmin(1)
        order = torch.argsort(places[every[:, 0], chosen], stable=True)
        return Patches(
            rows[order.to(rows.device)], kept[every[:, 0], chosen][order], losses[every[:, 0], chosen][order]
        )

    def _places(self, losses: Tensor) -> Tensor:
        """Numbers that ascend from the patch to take first: up to the limit the highest loss, beyond it the lowest."""
        if not self.trusted:
            return -losses
        limit = -math.log(self.trusted)
        return torch.where(losses <= limit, limit - losses, losses)

    def start(self, run: Run, job: Job) -> State:
        state = super().start(run, job)
        (images,) = state.images.parameters()
        parts = zip(torch.split(images.detach(), run.chunk), torch.split(state.labels.classes, run.chunk), strict=True)
        maps = torch.cat([maps_of(run, self.asked(run)[0], *part) for part in parts])
        state.extras["mask"] = (self.threshold - maps).clamp_min(0)[:, None]
        return state

    @torch.no_grad()
    def _update(self, run: Run, state: State) -> None:
        mask = state.extras["mask"]
        (images,) = state.images.parameters()
        before = images.detach().clone()
        state.optimizers["images"].step()
        images.copy_(before + mask * (images - before))
        into_range(state.images, run.source)
        images.copy_(torch.where(mask > 0, images, before))


def maps_of(run: Run, teacher: Teacher, images: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps (B, H, W) of a teacher; classes (B,) on any device."""
    layer = last_maps(teacher.network, run.source.shape, teacher.name)
    return activation_maps(teacher.network, layer, images, classes.to(run.device))


_known: "WeakKeyDictionary[Shared, dict[tuple[NRRDD, int], Patches]]" = WeakKeyDictionary()
