"""FYI (Son et al., FYI: Flip Your Images for Dataset Distillation, arXiv 2407.08113): a wrapper of any other method.

Wherever the base method looks at the synthetic images S it gets each one together with its mirror image, under the same
label::

    X(S) = [ S ; flip(S) ],   L_FYI(S) = L_base( X(S) )

Real images of a class are about as often seen from the left as from the right. A base method therefore pulls every
single synthetic image towards being its own mirror image, which blurs it; with X(S) the pair carries the symmetry and
the image is free. What is stored is S, at the price of twice the work on the synthetic side.

The doubling is done in front of augmentation, for matching and for training networks on S (mini-batches of b stored
images become 2b). Networks that score the set see S alone, mirrored only by their protocol's own augmentation; the
protocol "fyi" mirrors more often than the others, so compare a wrapped method with its base under one protocol.

Departures from the authors' code: any method can be wrapped, not DC, DSA, DM and MTT alone. The base keeps its own
augmentation, where their code also mirrors both sides with probability 1/2 before it draws an operation
(`dsdistill.augmentations.flip_first`). The set is saved (the code ends before it does). ``store="pairs"`` keeps X(S)
as the set, so that networks are trained on both halves, which the first version of the code evaluated as well; that
version also halved mini-batches before doubling them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, Run, State, Synthesizer
from dsdistill.errors import InvalidSetting
from dsdistill.parameterizations import Mirrored
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")


@dataclass(frozen=True, kw_only=True)
class FYI(Synthesizer):
    """Flip your images: the base method sees every synthetic image together with its mirror image."""

    paper: ClassVar[str] = "Son et al., FYI: Flip Your Images for Dataset Distillation, ECCV 2024, arXiv 2407.08113"

    base: Synthesizer
    """The method to wrap, with its settings."""
    store: Literal["images", "pairs"] = "images"
    """What the set holds: the images as stored, or the mirrored pairs (the same bytes, twice the training images)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, FYI):
            raise InvalidSetting("FYI.base", "FYI", "a method that is not wrapped yet: mirrored twice is not mirrored")
        if self.base.steps == 0:
            raise InvalidSetting(
                "FYI.base",
                self.base.title,
                "a method that learns images; this one selects or draws them, so nothing would change",
            )

    @property
    def ipc(self) -> int:
        """Stored images per class, those of the base."""
        return int(self.base.ipc)  # type: ignore[attr-defined]  # of methods that have a budget

    def with_ipc(self, ipc: int) -> Self:
        return replace(self, base=self.base.with_ipc(ipc))

    @property
    def steps(self) -> int:
        return self.base.steps

    def check(self, source: ImageSource) -> None:
        """Refuse what the base refuses; warn where a mirrored image is no image of its class (digits, letters).

        Raises:
            BadData, InvalidSetting: as the base does.
        """
        self.base.check(source)
        if not source.mirror_safe:
            logger.warning(
                "%s shows mirror images of %r, whose classes a flip may change: expect no gain", self.title, source.name
            )

    def prepare(self, run: Run) -> None:
        self.base.prepare(run)

    def jobs(self, run: Run) -> Sequence[Job]:
        return self.base.jobs(run)

    def start(self, run: Run, job: Job) -> State:
        state = self.base.start(run, job)
        state.images = Mirrored(state.images)  # its parameters are those of the images, which the optimisers hold
        return state

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        return self.base.step(run, state, iteration)

    def finish(self, run: Run, state: State) -> SyntheticDataset:
        if self.store == "images" and isinstance(state.images, Mirrored):
            state = replace(state, images=state.images.base)
        return self.base.finish(run, state)
