"""Mode guidance, as MGD3 and EVLF draw: images are pulled to clusters of their class; see `dsdistill.methods.mgd3`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from dsdistill.data import ImageSource
from dsdistill.engine import Run, no_method
from dsdistill.errors import InvalidSetting
from dsdistill.generative.method import Drawing
from dsdistill.generative.sampling import Pull, Sampler, furthest


@no_method
@dataclass(frozen=True, kw_only=True)
class Guided(Drawing):
    """Images that are drawn towards the modes of their class."""

    sampler: Sampler = Sampler(kind="ddpm")
    """How latents are drawn; by DDPM, as the authors' code does."""
    strength: Annotated[float, Ge(0)] = 0.1
    """λ of the pull."""
    until: Annotated[int, Ge(0)] = 25
    """Steps before the last one that are left without it: it acts while more than so many are left."""

    def needed(self) -> int:
        return self.ipc

    def check(self, source: ImageSource) -> None:
        """Refuse what `Drawing.check` refuses, and a solver that cannot be pulled.

        Raises:
            BadData, InvalidSetting: naming the place and the mend.
        """
        super().check(source)
        if self.until >= self.sampler.steps - 1 and self.strength > 0:
            told = (
                f"below {self.sampler.steps - 1}: of the {self.sampler.steps} steps of the sampler none would be pulled"
            )
            raise InvalidSetting(f"{type(self).__name__}.until", self.until, told)
        if self.sampler.kind == "dpm":
            raise InvalidSetting(
                f"{type(self).__name__}.sampler.kind", "dpm", "'ddpm' or 'ddim', where latents are pulled"
            )

    def pull(self, run: Run, classes: Tensor, places: Tensor) -> Pull:
        return Pull(self.of_modes(run, classes, places), self.strength, self.until)

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        for label in run.classes if run.shared.rehearsal is None else run.classes[:1]:
            run.shared.give_way()
            self.modes(run, label)
        overshoot = self.strength * furthest(self.denoiser(run).schedule, self.sampler, self.until)
        if self.sampler.kind == "ddim" and overshoot > 1:
            told = f"'ddpm': with the noise levels of this denoiser a step of DDIM pulls {overshoot:.1f} times too far"
            raise InvalidSetting(f"{type(self).__name__}.sampler.kind", "ddim", told)
