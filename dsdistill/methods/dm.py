"""Distribution matching (Zhao & Bilen, Dataset Condensation with Distribution Matching, arXiv 2110.04181).

Learns pixels S such that, under freshly initialised networks φ_θ and shared random views A_ω, the mean feature
of each synthetic class equals that of the real class::

    min_S  E_{θ, ω}  Σ_c ‖ mean_{x ∈ T_c} φ_θ(A_{ω_c}(x)) − mean_{s ∈ S_c} φ_θ(A_{ω_c}(s)) ‖²

φ_θ(x) is the flattened output of the last block; the sum runs over its coordinates and over classes, without
normalisation. Each step draws one θ, ``real_batch`` images of every class and one view per class, applied alike to
its real and synthetic images.

Departures from the authors' code: all classes pass the network together, in chunks (equal up to summation order,
because instance, group and layer normalisation do not couple images; a network with batch normalisation gets each
side whole, as one domain of statistics). Every random draw comes from the run's seed, not from the clock. Exactly
``iterations`` updates are made, and the last one is what is saved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from dsdistill.augmentations import Augmentation, Siamese, Views
from dsdistill.engine import Job, Metrics, PerClass, Run, State
from dsdistill.networks import Need, NetworkSpec, embed, has_batchnorm
from dsdistill.objectives.distribution import class_sums, mean_distance

_UNSPLIT = 4  # a class of up to so many chunks passes as one, which saves a forward pass


@dataclass(frozen=True, kw_only=True)
class DM(PerClass):
    """Distribution matching: synthetic class means follow real class means under random networks."""

    paper: ClassVar[str] = "Zhao & Bilen, Dataset Condensation with Distribution Matching, WACV 2023, arXiv 2110.04181"
    network_needs: ClassVar[tuple[Need, ...]] = ("features",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The defaults of the authors' code (main_DM.py); from IPC 100 on, they take a step size of 10.
        "cifar10/ipc1": {"ipc": 1},
        "cifar10/ipc10": {"ipc": 10},
        "cifar10/ipc50": {"ipc": 50},
    }

    iterations: Annotated[int, Ge(1)] = 20_000
    """Outer steps."""
    real_batch: Annotated[int, Ge(1)] = 256
    """Real images per class and step, without replacement; a smaller class gives all it has."""
    lr_images: Annotated[float, Gt(0)] = 1.0
    """SGD step size on standardised pixels."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of that SGD."""
    network: NetworkSpec = NetworkSpec()
    """Network whose random initialisations embed the images."""
    augmentation: Augmentation | None = Siamese()
    """Views shared by the real and synthetic images of a class; flips are left out where they change the class."""

    @property
    def steps(self) -> int:
        return self.iterations

    def start(self, run: Run, job: Job) -> State:
        images, labels = self.random_real(run)
        optimizer = torch.optim.SGD(images.parameters(), lr=self.lr_images, momentum=self.momentum)
        return State(images, labels, {"images": optimizer})

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        network = run.network(self.network, iteration)
        views = self._sample_views(run, iteration)
        target = self._real_means(run, network, views, iteration)
        owner = _class_positions(run, state)
        whole = has_batchnorm(network)  # its statistics couple all images of a side
        optimizer = state.optimizers["images"]
        optimizer.zero_grad()
        loss = torch.zeros((), device=run.device)
        sizes = state.images.multiplicity.new_zeros(len(run.classes)).index_add(0, owner, state.images.multiplicity)
        for part in _class_ranges(sizes, int(sizes.sum()) if whole else run.chunk):
            # The loss is a sum over classes, so its gradient may be taken range by range.
            if whole or int(sizes[part].sum()) <= _UNSPLIT * run.chunk:
                distance = mean_distance(target[part], self._synthetic_means(state, network, views, owner, part))
                distance.backward()  # type: ignore[no-untyped-call]
            else:
                distance = self._split_class(state, network, views, owner, part, target[part], run.chunk)
            loss += distance.detach()
        optimizer.step()
        state.images.constrain()
        return {"loss": loss}

    def _sample_views(self, run: Run, iteration: int) -> Views | None:
        """One view per class, to be shared by its real and synthetic images."""
        suited = self.augmentation.suited(run.source.mirror_safe) if self.augmentation else None
        if suited is None:
            return None
        generator = run.rng.at("views", iteration, device="cpu")
        return suited.sample(len(run.classes), run.source.shape, generator, per="class", device=run.device)

    @torch.no_grad()
    def _real_means(self, run: Run, network: nn.Module, views: Views | None, iteration: int) -> Tensor:
        """(K, D) mean features of fresh real images; only sums are kept, so memory does not grow with the batch."""
        index = run.source.per_class_indices(run.classes, self.real_batch, run.rng.at("real", iteration))
        sizes = torch.tensor(run.source.sizes_per_class(run.classes, self.real_batch))
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        chunk = len(owner) if has_batchnorm(network) else run.chunk
        sums = torch.zeros((), device=run.device)
        for rows, whose in zip(torch.split(index, chunk), torch.split(owner, chunk), strict=True):
            sums = sums + self._sums(network, run.source.gather(rows), views, whose, slice(0, len(sizes)))
        return sums / sizes.to(sums, non_blocking=True)[:, None]

    def _synthetic_means(
        self, state: State, network: nn.Module, views: Views | None, owner: Tensor, part: slice
    ) -> Tensor:
        """(K', D) mean features of the synthetic images of a range of classes, differentiable in what is stored."""
        images, stored = state.images.decode(((owner >= part.start) & (owner < part.stop)).nonzero().flatten())
        counts = owner[stored].bincount(minlength=part.stop)[part]
        sums = self._sums(network, images, views, owner[stored], part)
        return sums / counts.to(sums, non_blocking=True)[:, None]

    def _split_class(
        self,
        state: State,
        network: nn.Module,
        views: Views | None,
        owner: Tensor,
        part: slice,
        target: Tensor,
        chunk: int,
    ) -> Tensor:
        """The loss of one class too large to pass at once, and its gradient, at the cost of a second forward pass.

        With s the sum of the n features and t the target, the gradient of ‖ s/n − t ‖² in s is 2 (s/n − t) / n: once
        it is known, every chunk of images can be differentiated on its own.
        """
        items, multiplicity = (owner == part.start).nonzero().flatten(), state.images.multiplicity
        count = int(multiplicity[items].sum())
        groups = torch.split(items, max(1, chunk // int(multiplicity[items].max())))

        def sums(group: Tensor) -> Tensor:
            images, stored = state.images.decode(group)
            return self._sums(network, images, views, owner[stored], part)

        with torch.no_grad():
            gap = torch.stack([sums(group) for group in groups]).sum(0) / count - target
        for group in groups:
            (sums(group) * (2 * gap / count)).sum().backward()  # type: ignore[no-untyped-call]
        return gap.square().sum()

    def _sums(self, network: nn.Module, images: Tensor, views: Views | None, owner: Tensor, part: slice) -> Tensor:
        """(K', D) sums of the features of each class in ``part``; ``owner`` (M,) is the class position of an image."""
        if views is not None and self.augmentation is not None:
            images = self.augmentation.apply(images, views, owner)
        rows = (owner - part.start).to(images.device, non_blocking=True)
        return class_sums(embed(network, images), rows, part.stop - part.start)


def _class_positions(run: Run, state: State) -> Tensor:
    """Position in ``run.classes`` of every stored item, (N,) on the CPU."""
    position = torch.full((run.source.num_classes,), -1)
    position[list(run.classes)] = torch.arange(len(run.classes))
    return position[state.labels.classes]


def _class_ranges(sizes: Tensor, limit: int) -> Iterator[slice]:
    """Consecutive classes whose decoded images, ``sizes`` (K,) of each class, are together about ``limit``."""
    ends = sizes.cumsum(0).tolist()
    begin, before = 0, 0
    for end in range(1, len(ends) + 1):
        if end == len(ends) or ends[end] - before > limit:
            yield slice(begin, end)
            begin, before = end, ends[end - 1]
