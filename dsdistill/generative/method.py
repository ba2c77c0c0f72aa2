"""What methods that draw their images share: models, jobs, noise, and the fusion of text into latents."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.core.device import is_out_of_memory, release_memory
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Run, Shared, State, Synthesizer, no_method
from dsdistill.errors import BadData, InvalidSetting, Stopped
from dsdistill.experts import Committee
from dsdistill.generative.denoiser import Denoiser
from dsdistill.generative.fused import digest_of, fused_by
from dsdistill.generative.fusing import Trained
from dsdistill.generative.fusion import Fusion
from dsdistill.generative.models import LatentModel, Models, latents_of, model_of
from dsdistill.generative.redraw import Redraw
from dsdistill.generative.sampling import Pull, Sampler, Start, drawn, noise_numbers
from dsdistill.generative.text import clip_place
from dsdistill.labels import HardLabels
from dsdistill.matching import refuse_whitened
from dsdistill.parameterizations import Pixels
from dsdistill.selection.k_means import k_means_centres
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")
_WEIGHTS = "pretrained models"  # what a run shares of them: where they come from


@no_method
@dataclass(frozen=True, kw_only=True)
class Drawing(Synthesizer):
    """Images that a latent diffusion model draws, class by class."""

    protocol: ClassVar[str] = "minimax"

    ipc: Annotated[int, Ge(1)] = 10
    """Images per class."""
    models: Models = Models()
    """Autoencoder and denoiser, loaded or trained on the real images."""
    sampler: Sampler = Sampler()
    """How latents are drawn."""
    fusion: Fusion | None = None
    """EVLF before anything is made of latents: they are fused with the names of their classes; null: they are not."""
    redraw: Redraw | None = None
    """Images that teachers do not recognise are drawn again, and the set says so; null: each is drawn once."""
    classes_together: Annotated[int, Ge(1)] = 10
    """Classes of one job, which is kept when it is done."""

    @property
    def steps(self) -> int:
        return 0  # images are drawn at once

    def check(self, source: ImageSource) -> None:
        """Refuse whitened images, classes smaller than what is asked of them, and what is not where it is said to be.

        Raises:
            BadArtifact, BadData, InvalidSetting, MissingWeights: naming the place and the mend.
        """
        super().check(source)
        refuse_whitened(type(self).__name__, source)
        if self.redraw is not None:
            self.redraw.check(type(self).__name__, source)
        self.models.check(source)
        if self.fusion is not None and self.fusion.text is not None:
            clip_place(self.fusion.text, revision=self.fusion.revision, download=self.fusion.download)
        need = self.needed()
        small = [f"{name!r} ({n})" for name, n in zip(source.classes, source.counts, strict=True) if n < need]
        if small:
            raise BadData(
                f"{len(small)} classes of {source.name!r} have fewer than the {need} images that as many modes take: "
                f"{', '.join(small[:5])}; lower ipc, or take Diffusion or Minimax, which need no modes"
            )

    def needed(self) -> int:
        """Real images that every class must have."""
        return 1

    def prepare(self, run: Run) -> None:
        if self.redraw is not None:
            Committee.of(run, self.redraw.teachers)  # refuses those of other images before any model is trained
        self._refuse_other_weights(run)
        guided, channels = self.sampler.guided, self.model(run).denoiser.channels
        if guided is not None and guided > channels:
            told = f"at most {channels}, the channels of these latents, or null for all"
            raise InvalidSetting(f"{type(self).__name__}.sampler.guided", guided, told)
        self.denoiser(run)
        if self.fusion is not None:
            self.fused(run)

    def _refuse_other_weights(self, run: Run) -> None:
        """Refuse to continue with pretrained models other than those that a run began with, under the same path."""
        kept = None if self.models.weights is None else run.shared.known(_WEIGHTS)
        if kept is None:
            return
        told, before = ", ".join(self.model(run).told), bytes(kept["told"].tolist()).decode()
        if before != told:
            raise BadData(f"this run began with other weights: {before}; now {told}; choose another output folder")

    def jobs(self, run: Run) -> Sequence[Job]:
        size = self.classes_together
        parts = [run.classes[begin : begin + size] for begin in range(0, len(run.classes), size)]
        return [Job(f"classes-{part[0]:05d}", part) for part in parts]

    def start(self, run: Run, job: Job) -> State:
        if self.models.weights is not None:  # not before: a run that is refused until here leaves nothing
            told = ", ".join(self.model(run).told)
            run.shared.get(_WEIGHTS, lambda: {"told": torch.tensor(list(told.encode()))})
        classes = torch.tensor(job.classes).repeat_interleave(self.ipc)
        places = torch.arange(self.ipc).repeat(len(job.classes))

        def draw(rows: Tensor, turn: int) -> Tensor:
            return self._in_parts(run, rows, lambda some: self.images(run, classes[some], places[some], turn))

        every = torch.arange(len(classes))
        try:
            made = draw(every, 0) if self.redraw is None else self.redraw.chosen(run, classes, draw)
        except Stopped as error:
            kept = f"the jobs before this one, kept in {error.path}; its {len(job.classes)} classes are drawn anew"
            raise Stopped(error.signum, error.iteration, error.path, kept) from None
        return State(Pixels(made), HardLabels(classes, run.source.num_classes))

    def _in_parts(self, run: Run, rows: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``draw`` makes of rows, as many together as memory holds: images do not depend on that."""
        size = _fit.get(run.shared, self.model(run).chunk(run))
        made: list[Tensor] = []
        begin = 0
        while begin < len(rows):
            run.shared.give_way()
            some = rows[begin : begin + size]
            try:
                made.append(draw(some))
                begin += len(some)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(some) == 1:
                    raise
            size = _fit[run.shared] = len(some) // 2  # here the error and its frames, which hold tensors, are gone
            release_memory(run.device)
            logger.warning("memory ran out while %d images were drawn together; now %d are", len(some), size)
        return torch.cat(made)

    def images(self, run: Run, classes: Tensor, places: Tensor, turn: int = 0) -> Tensor:
        """Standardised images (B, C, H, W): the ``places``-th (B,) of classes (B,), both on the CPU, in a try."""
        model = self.model(run)
        noise = self.noise(run, model, classes, places, turn)
        latents = drawn(
            self.denoiser(run),
            classes.to(run.device),
            noise,
            self.sampler,
            pull=self.pull(run, classes, places),
            start=self.begin(run, classes, places),
        )
        return model.decoded(latents)

    def pull(self, run: Run, classes: Tensor, places: Tensor) -> Pull | None:
        """What each paper has of its own: where the latents of these images are pulled to."""
        return None

    def begin(self, run: Run, classes: Tensor, places: Tensor) -> Start | None:
        """Or the latents that these images begin from."""
        return None

    def noise(self, run: Run, model: LatentModel, classes: Tensor, places: Tensor, turn: int = 0) -> Tensor:
        """(n, B, c, g, g): of each image and try from a stream of its own, whatever passes with it.

        It is known by the name of the class, so that it is the same whatever other classes there are.
        """
        shape = (noise_numbers(self.sampler), *model.autoencoder.latent)
        rng, names = run.rng.scoped("").within("draw", turn), run.source.classes
        own = [
            torch.randn(shape, generator=rng.within(f"class {names[label]}").at("image", place, device="cpu"))
            for label, place in zip(classes.tolist(), places.tolist(), strict=True)
        ]
        return torch.stack(own, 1).to(run.device)

    def model(self, run: Run) -> LatentModel:
        """The models of the run. Errors as in `model_of`."""
        return model_of(run, self.models)

    def denoiser(self, run: Run) -> Denoiser:
        """What draws: that of the models, unless a method makes another of it."""
        return self.model(run).denoiser

    def fused(self, run: Run) -> Trained:
        """The fusion of a run, trained at the first call.

        Raises:
            MissingWeights, MissingExtra: of its text encoder. Stopped: the run was asked to stop.
        """
        assert self.fusion is not None
        return fused_by(run, self.models, self.fusion)

    def latents(self, run: Run, label: int, *, mirrored: bool = False) -> Tensor:
        """Scaled latents (n, c, g, g) of the real images of a class, fused with its name where that is asked for.

        With ``mirrored`` those of mirrored images follow, where mirroring is safe.
        """
        source, model = run.source, self.model(run)
        begin, every = source.offsets[label], latents_of(run, self.models)
        plain = every[: None if mirrored else 1, begin : begin + source.counts[label]].flatten(0, 1)
        if self.fusion is None:
            return plain * model.autoencoder.scale
        trained, own = self.fused(run), torch.full((len(plain),), label, device=run.device)
        parts = zip(*(torch.split(one, model.chunk(run)) for one in (plain, own)), strict=True)
        return torch.cat([trained.fuse(*part) for part in parts]) * model.autoencoder.scale

    def modes(self, run: Run, label: int) -> Tensor:
        """Centres (ipc, c, g, g) of k-means clusters of the scaled latents of a class, the largest cluster first."""
        known = _modes.setdefault(run.shared, {})
        key = (self.models, self.fusion, self.ipc, label, run.rng.seed)
        if key not in known:
            latents = self.latents(run, label)
            generator = run.rng.scoped("").within("modes").at(f"class {run.source.classes[label]}", device="cpu")
            known[key] = k_means_centres(latents.flatten(1), self.ipc, generator).view(-1, *latents.shape[1:])
        return known[key]

    def of_modes(self, run: Run, classes: Tensor, places: Tensor) -> Tensor:
        """The mode of each of these images, (B, c, g, g)."""
        pairs = zip(classes.tolist(), places.tolist(), strict=True)
        return torch.stack([self.modes(run, label)[place] for label, place in pairs])

    def finish(self, run: Run, state: State) -> SyntheticDataset:
        """The set, which says what drew it."""
        made = super().finish(run, state)
        told = self.model(run).told
        if self.fusion is not None and self.fusion.text is not None:
            states = digest_of(self.fused(run).texts)[:12]
            told = (*told, f"fused with names by the text encoder {self.fusion.text!r} (states sha256 {states})")
        if self.redraw is not None:
            told = (*told, *self.redraw.told(run, *made.tensors()))
        return replace(made, recipe=replace(made.recipe, notes=(*made.recipe.notes, *told)))


_fit: "WeakKeyDictionary[Shared, int]" = WeakKeyDictionary()
"""Images that can be drawn together where memory once ran out."""
_modes: "WeakKeyDictionary[Shared, dict[tuple[Models, Fusion | None, int, int, int], Tensor]]" = WeakKeyDictionary()
