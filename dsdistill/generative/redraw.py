"""Images that are drawn again while teachers do not recognise them, by a rule that the set states.

With q(x) the mean of the teachers' softmax probabilities for the class of an image, and its draws x_0, x_1, ..., each
with noise of a stream of its own::

    kept is the first x_t with q(x_t) ≥ confidence, or where none of `tries` draws has it the one with the largest q

It costs up to ``tries`` times the drawing. A set so chosen owes something to its teachers: networks like them may find
it easier than others do.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.data import ImageSource
from dsdistill.engine import Run
from dsdistill.experts import Committee, Teachers
from dsdistill.experts.schooling import require_classes

logger = logging.getLogger("dsdistill")


@dataclass(frozen=True, kw_only=True)
class Redraw:
    """Which images are drawn again, and how often.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    teachers: Teachers = Teachers()
    """Networks trained on the real images, one or several, whose mean probability for an image's class is asked."""
    confidence: Annotated[float, Gt(0), Le(1)] = 0.5
    """The probability from which on an image is kept."""
    tries: Annotated[int, Ge(2)] = 4
    """Draws of an image at most; where none reaches that probability the one that comes nearest is kept."""

    def __post_init__(self) -> None:
        validate(self)

    def check(self, method: str, source: ImageSource) -> None:
        """Refuse teachers that are not there, and images that none can be trained on.

        Raises:
            BadArtifact, BadData, InvalidSetting: naming the place and the mend.
        """
        require_classes(source)
        self.teachers.require(method, alone=False)
        for spec in self.teachers.networks:
            spec.require((), source.shape, source.num_classes)

    def chosen(self, run: Run, classes: Tensor, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The draw of each image that is kept, (B, C, H, W).

        In a rehearsal all are drawn twice, and the time of further tries is added: as long as it can take.

        Args:
            run: of a job.
            classes: (B,), on the CPU.
            draw: standardised images at places (m,) among the B, on the CPU, in a try counted from 0.
        """
        every, rehearsal = torch.arange(len(classes)), run.shared.rehearsal
        images = draw(every, 0)
        sure = self.probabilities(run, images, classes)
        if rehearsal is not None:
            begin = time.perf_counter()
            self.probabilities(run, draw(every, 1), classes)
            jobs = run.source.num_classes / len(run.classes)
            rehearsal.seconds += jobs * (self.tries - 2) * (time.perf_counter() - begin)
            return images
        for turn in range(1, self.tries):
            left = (~(sure >= self.confidence)).nonzero().flatten()  # as the notes count, also what is no number
            if not len(left):
                break
            again = draw(left, turn)
            found = self.probabilities(run, again, classes[left])
            better = (found > sure[left]) | sure[left].isnan()
            images[left[better].to(images.device)] = again[better.to(images.device)]
            sure[left[better]] = found[better]
        return images

    @torch.no_grad()
    def probabilities(self, run: Run, images: Tensor, classes: Tensor) -> Tensor:
        """q (B,), on the CPU, of images (B, C, H, W) for their classes (B,), on the CPU."""
        committee, found = Committee.of(run, self.teachers), []
        for part, own in zip(torch.split(images, run.chunk), torch.split(classes, run.chunk), strict=True):
            shown = part.to(run.device)
            said = torch.stack([teacher.network(shown).float().softmax(1) for teacher in committee]).mean(0)
            found.append(said.cpu().gather(1, own[:, None])[:, 0])
        return torch.cat(found)

    def told(self, run: Run, images: Tensor, classes: Tensor) -> tuple[str, str]:
        """The rule, and how many of the images of a job satisfy it, for the notes of a set."""
        reached = int((self.probabilities(run, images, classes) >= self.confidence).sum())
        names = [f"{one.name} ({one.digest[:16]})" for one in Committee.of(run, self.teachers)]
        of = f"classes {run.classes[0]} to {run.classes[-1]}" if len(run.classes) > 1 else f"class {run.classes[0]}"
        notes = (
            f"each image was drawn up to {self.tries} times, until its class had a {'mean ' * (len(names) > 1)}"
            f"probability of {self.confidence} for {' and '.join(names)}",
            f"{reached} of {len(images)} images of {of} reach the probability {self.confidence}, the others are the "
            "most probable of their draws",
        )
        if run.shared.rehearsal is None:
            logger.info("%s; %s", *notes)
        return notes
