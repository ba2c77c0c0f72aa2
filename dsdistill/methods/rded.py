"""RDED (Sun et al., On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm,
arXiv 2312.03526).

Nothing is optimised. Of a pool of real images of each class, each gives the one of K random crops that the teacher f
recognises best; the IPC · f² best of these make the images, f x f to each::

    score(crop) = −CE(f(crop in the middle of mean colour), y),     cell k of image i is the crop of rank k · IPC + i

Labels are the teacher's, of random views of the mosaics, while a network learns (protocol "rded").

Departures from the authors' code: the draw of pool and crops follows the run's seed (the code seeds its last stage
only), and pixels keep the standardisation of their source (the code has ImageNet's constants for CIFAR). Teachers of
the code's release are trained by torchvision's recipe; here they are what ``teachers`` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from dsdistill.data import ImageSource
from dsdistill.engine import Job, Preset, Run, State, Synthesizer
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee, Teachers
from dsdistill.labels import HardLabels
from dsdistill.matching.patches import CROPS, POOL, cut, factor_of, mosaics, recognised_patches
from dsdistill.parameterizations import Pixels

_CODE = "authors' code"


@dataclass(frozen=True, kw_only=True)
class RDED(Synthesizer):
    """Realistic, diverse, efficient: mosaics of the real patches that a teacher recognises best; nothing is learned."""

    protocol: ClassVar[str] = "rded"
    paper: ClassVar[str] = (
        "Sun et al., On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm, "
        "CVPR 2024, arXiv 2312.03526"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "small": Preset(f"{_CODE}, up to 64 pixels", {"factor": 1}),
        "large": Preset(f"{_CODE}, from 128 pixels on", {"factor": 2}),
        "large_one_crop": Preset(f"{_CODE}, ImageNet with one crop of each image", {"factor": 2, "crops": 1}),
    }

    ipc: Annotated[int, Ge(1)] = 10
    """Synthetic images per class."""
    factor: Annotated[int, Ge(1)] | None = None
    """f, patches along each side of an image; null: 2 from 128 pixels on, else 1."""
    pool: Annotated[int, Ge(1)] = POOL
    """Random real images of each class that patches are cut out of."""
    crops: Annotated[int, Ge(1)] = CROPS
    """K, random crops of each of them."""
    classes_together: Annotated[int, Ge(1)] = 100
    """Classes of one job, which is kept when it is done."""
    teachers: Teachers = Teachers()
    """The network trained on the real images that scores the patches."""

    def check(self, source: ImageSource) -> None:
        """Refuse classes and pools with too few images for so many patches.

        Raises:
            BadData, InvalidSetting: naming the place and the mend.
        """
        super().check(source)
        self.teachers.require("RDED", alone=True)
        for spec in self.teachers.networks:
            spec.require((), source.shape, source.num_classes)
        need = self.ipc * self._factor(source) ** 2
        if self.pool < need:
            raise InvalidSetting("RDED.pool", self.pool, f"at least {need}, a patch of its own for each cell")
        small = [f"{name!r} ({n})" for name, n in zip(source.classes, source.counts, strict=True) if n < need]
        if small:
            raise BadData(
                f"{len(small)} classes of {source.name!r} have fewer than the {need} images that ipc={self.ipc} takes "
                f"patches of: {', '.join(small[:5])}; lower ipc or factor"
            )

    def _factor(self, source: ImageSource) -> int:
        return factor_of(source.shape) if self.factor is None else self.factor

    def prepare(self, run: Run) -> None:
        committee = Committee.of(run, self.teachers)
        if len(committee) > 1:
            names = ", ".join(teacher.name for teacher in committee)
            raise InvalidSetting("teachers", names, "RDED takes one teacher")

    def jobs(self, run: Run) -> Sequence[Job]:
        size = self.classes_together
        parts = [run.classes[begin : begin + size] for begin in range(0, len(run.classes), size)]
        return [Job(f"classes-{part[0]:05d}", part) for part in parts]

    def start(self, run: Run, job: Job) -> State:
        made = torch.cat([self._images(run, label) for label in job.classes])
        labels = torch.tensor(job.classes).repeat_interleave(self.ipc)
        return State(Pixels(made), HardLabels(labels, run.source.num_classes))

    def _images(self, run: Run, label: int) -> torch.Tensor:
        """Those of one class, (ipc, C, H, W)."""
        factor, shape = self._factor(run.source), run.source.shape
        teacher = Committee.of(run, self.teachers)[0]
        ranked = recognised_patches(run, teacher, label, factor, self.pool, self.crops)
        chosen = ranked.take(torch.arange(self.ipc * factor**2))
        size = (shape[1] // factor, shape[2] // factor)
        return mosaics(torch.split(cut(run, chosen.rows, chosen.boxes, size), self.ipc), shape)
