"""Fitting images to frozen teachers: the loss of SRe2L and of what follows it, and the settings that belong to it.

Images X with classes y, seen under a view A, are to be recognised by a teacher f and to give the inputs of its batch
norms the statistics that they had on real images (`dsdistill.networks.measured`)::

    CE(f(A(X)), y) + α Σ_ℓ m_ℓ r_ℓ(A(X)),     m_1 = 10, m_ℓ = 1 else

by Adam with betas (0.5, 0.9) and the step size lr/2 (1 + cos(π t/I)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsdistill.augmentations import CropViews, ResizedCrop
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, Shared, State, Synthesizer
from dsdistill.errors import BadData
from dsdistill.experts import Committee, Teacher, Teachers
from dsdistill.matching.pixels import refuse_whitened
from dsdistill.networks import MeasuredNetwork
from dsdistill.parameterizations import Parameterization
from dsdistill.synthetic import SyntheticDataset

LEAST_SHARE = 0.08
"""Smallest share of an image that a crop may be of, as in the library's random resized crop."""


@dataclass(frozen=True, kw_only=True)
class Fitting(Synthesizer):
    """What methods that fit images to teachers share: settings, views, the loss, and the record of who was asked."""

    protocol: ClassVar[str] = "cvdd"
    alone: ClassVar[bool] = True
    """Whether it takes a single teacher."""
    whole_batches: ClassVar[bool] = True  # statistics couple the images of a problem

    ipc: Annotated[int, Ge(1)] = 10
    """Synthetic images per class."""
    iterations: Annotated[int, Ge(1)] = 4000
    """Steps for each problem."""
    lr_images: Annotated[float, Gt(0)] = 0.25
    """Step size of Adam on standardised pixels, which falls to 0 along half a cosine."""
    statistics_weight: Annotated[float, Ge(0)] = 0.01
    """α, weight of the distances of batch statistics."""
    first_layer: Annotated[float, Ge(0)] = 10.0
    """m_1, what the distance at the first batch norm counts for."""
    normalised: bool = False
    """Divide each distance by the square root of its channels, and their sum by the number of layers: then α means the
    same for networks of any depth and width. The authors' code does not."""
    classes_together: Annotated[int, Ge(1)] = 100
    """Classes whose images share a batch, hence its statistics."""
    problems_together: Annotated[int, Ge(1)] = 1
    """Problems that pass as one batch, each with statistics of its own; more fill a GPU, and change nothing but
    rounding."""
    crop: bool = True
    """Views are random crops, resized, and mirrored where that is safe."""
    shift: Annotated[int, Ge(0)] | None = None
    """J: views are rolled by 0 to so many pixels down and to the right; null: an eighth of the image, but at most 4 up
    to 64 pixels, and 32 from 224 on."""
    shift_both: bool = False
    """They are rolled by -J to J, as in the script of SRe2L for Tiny ImageNet alone."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of teachers; pixels, statistics and losses stay float32."""
    teachers: Teachers = Teachers()
    """Networks trained on the real images, which recover them."""

    @property
    def steps(self) -> int:
        return self.iterations

    def check(self, source: ImageSource) -> None:
        """Refuse what teachers cannot be trained on, a single class, and whitened images.

        Raises:
            BadData, InvalidSetting: naming the place and the mend.
        """
        super().check(source)
        refuse_whitened(type(self).__name__, source)
        if source.num_classes < 2:
            raise BadData(f"{type(self).__name__} needs teachers that tell classes apart, {source.name!r} has one")
        self.teachers.require(type(self).__name__, alone=self.alone)
        for spec in self.teachers.networks:
            spec.require((), source.shape, source.num_classes)

    def asked(self, run: Run) -> Sequence[Teacher]:
        """The teachers of a run. Errors as in `Committee.of`."""
        return Committee.of(run, self.teachers)

    def finish(self, run: Run, state: State) -> SyntheticDataset:
        """The set, class by class, which says what recovered it."""
        made = super().finish(run, state)
        order = torch.argsort(made.labels.classes, stable=True)
        told = (f"recovered from {one.name}, {one.digest[:16]}" for one in self.asked(run))
        recipe = replace(made.recipe, notes=(*made.recipe.notes, *told))
        return replace(made, images=made.images.subset(order), labels=made.labels.subset(order), recipe=recipe)

    def least_share(self, iteration: int) -> float:
        """Smallest share of an image that a crop may be of."""
        return LEAST_SHARE

    def views(self, run: Run, iteration: int) -> ResizedCrop:
        """What a step may see of the images."""
        _, height, width = run.source.shape
        return ResizedCrop(
            scale=(self.least_share(iteration) if self.crop else 1.0, 1.0),
            ratio=(3 / 4, 4 / 3) if self.crop else (1.0, 1.0),
            flip=0.5 if self.crop and run.source.mirror_safe else 0.0,
            shift=usual_shift(min(height, width)) if self.shift is None else self.shift,
            shift_both=self.shift_both,
        )

    def _optimizer(self, images: Parameterization) -> torch.optim.Optimizer:
        return torch.optim.Adam(images.parameters(), betas=(0.5, 0.9))

    def _begin(self, state: State, iteration: int) -> torch.optim.Optimizer:
        """The optimiser of the images, without gradients and with the step size of an iteration."""
        optimizer = state.optimizers["images"]
        optimizer.param_groups[0]["lr"] = self.lr_images * (1 + math.cos(math.pi * iteration / self.iterations)) / 2
        optimizer.zero_grad()
        return optimizer

    def _differentiate(
        self, teacher: MeasuredNetwork, seen: Tensor, classes: Tensor, groups: int, weight: float = 1.0
    ) -> Tensor:
        """Add the gradient of the loss, summed over problems, to that of ``seen``; (3,) loss, entropy, statistics."""
        entropy, statistics = self._fit(teacher, seen, classes, groups)
        loss = entropy + self.statistics_weight * statistics
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        return weight * torch.stack([loss, entropy, statistics]).detach()

    def _fit(self, teacher: MeasuredNetwork, seen: Tensor, classes: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Sums over problems of the mean cross-entropy and of the weighted distances of statistics."""
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits, distances = teacher(seen, groups)
        entropy = cross_entropy(logits.to(distances.dtype), classes, reduction="sum") * (groups / len(seen))
        factors = torch.ones_like(distances[0])
        factors[0] = self.first_layer
        if self.normalised:
            channels = torch.tensor(teacher.channels, device=factors.device)
            factors = factors / (channels.sqrt() * len(factors))
        return entropy, (distances @ factors).sum()


def group_key(first: str, count: int) -> str:
    """Of a job of so many consecutive problems, by the key of the first: short, as it names a folder."""
    return first if count == 1 else f"{first}x{count}"


def first_and_count(key: str) -> tuple[str, int]:
    """Inverse of `group_key`."""
    first, _, count = key.partition("x")
    return first, int(count or 1)


def usual_shift(side: int) -> int:
    """J of the authors' code: 4 at 32 and 64 pixels, 32 at 224; in proportion elsewhere."""
    if side <= 64:
        return min(4, side // 8)
    return 32 if side >= 224 else side // 8


def measured(run: Run, teachers: Teachers) -> list[MeasuredNetwork]:
    """The committee of a run, its batch norms measured; made at the first call. Errors as in `Committee.of`."""
    made = _measured.setdefault(run.shared, {})
    if teachers not in made:
        made[teachers] = [_laid_out(teacher) for teacher in Committee.of(run, teachers)]
    return made[teachers]


_measured: "WeakKeyDictionary[Shared, dict[Teachers, list[MeasuredNetwork]]]" = WeakKeyDictionary()


def _laid_out(teacher: Teacher) -> MeasuredNetwork:
    made = MeasuredNetwork(teacher.network, teacher.name)
    made.module.to(memory_format=torch.channels_last)  # statistics and convolutions are quickest there
    return made


def view_of_each(views: ResizedCrop, run: Run, streams: Sequence[Rng], iteration: int) -> CropViews:
    """One view for each problem, from streams of its own."""
    shape = run.source.shape
    records = [views.sample(1, shape, rng.at("views", iteration, device="cpu")) for rng in streams]
    return CropViews.of_numbers(torch.cat([record.numbers() for record in records]), shape)


def sought(shown: Tensor) -> Tensor:
    """A copy of images, in the layout that suits teachers, whose gradient is to be found."""
    return shown.detach().contiguous(memory_format=torch.channels_last).requires_grad_()


def reported(metrics: Tensor, problems: int) -> dict[str, Tensor]:
    """What a step reports: means over problems of the sums (3,) that `Fitting._differentiate` gives."""
    return dict(zip(("loss", "entropy", "statistics"), (metrics / problems).unbind(), strict=True))
