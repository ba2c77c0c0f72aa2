"""Trajectories of experts: trained on the real images of a run once, and found by every other that wants the same."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.core.config import settings_digest, to_dict, validate
from dsdistill.engine import Run, Shared
from dsdistill.errors import InvalidSetting, Stopped
from dsdistill.experts.base import ExpertTraining
from dsdistill.experts.growth import Growth
from dsdistill.experts.plain import PlainTraining
from dsdistill.experts.shelf import FolderShelf, MemoryShelf, Shelf
from dsdistill.experts.trainer import Trainer
from dsdistill.networks import FlatNetwork, NetworkSpec

STORED_AS = 1
"""Counts the ways in which experts were trained and stored by versions of this package; part of their digest."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Which experts a method asks for.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    count: Annotated[int, Ge(1)] = 100
    """Networks trained on the real images."""
    training: ExpertTraining = PlainTraining()
    """How they are trained: PlainTraining (MTT), FlatTraining (FTD, DATM) or SmoothTraining (AST)."""
    precision: Literal["float32", "float16"] = "float32"
    """Of their stored parameters. float16 halves the disk, and adds up to 5e-4 to the loss of matching an epoch or so.
    """
    seed: int = 0
    """Of the experts, whatever the seed of the run is: runs with other seeds share them."""
    together: Annotated[int, Ge(1)] | None = None
    """How many are trained at once as one stacked computation; null: 8 on a GPU, 1 elsewhere. Changes results by
    rounding only."""
    compiled: bool = False
    """Compile a step: about half a minute for each size of a batch and of a stack, then up to twice as quick. Changes
    results by rounding only. Estimates leave compiling out."""

    def __post_init__(self) -> None:
        validate(self)


class Trajectories:
    """Snapshots of experts before their training and after each epoch, read as they are asked for.

    They are kept under the run's store, where every run on the same images with the same network and `Experts` finds
    them, whatever its seed and how many it asks for; without a store, in memory. An interrupted training goes on after
    the last whole epoch that was kept, and one of few epochs is extended. In a rehearsal nothing is trained in full:
    time and disk of experts that are not there are counted, and their snapshots are points of a line.

    Attributes:
        network: a network of their make as a function of its parameters, `frozen` as `dsdistill.engine` says. Batch
            normalisation takes the statistics of its batch in every mode, as no others are kept.
        count: number of experts.
        epochs: their last snapshot is the one after so many.
        folder: where they are kept; None in memory.

    Args:
        run: of the whole or of any job.
        experts: which.
        spec: what they are.
        epochs: how far they are trained at least.

    Raises:
        InvalidSetting: more epochs than the training has, or an expert stopped being finite.
        Stopped: the run was asked to stop; whole epochs are kept.
        OutOfSpace: the disk cannot hold them.
        OutputConflict: the store cannot be written.
    """

    def __init__(self, run: Run, experts: Experts, spec: NetworkSpec, epochs: int) -> None:
        if epochs > experts.training.epochs:
            allowed = f"at most {experts.training.epochs}, the epochs of {type(experts.training).__name__}: raise those"
            raise InvalidSetting("epochs", epochs, allowed)
        self.count, self.epochs, self._device = experts.count, epochs, run.device
        self.network, self._shelf = shelf_of(run, experts, spec)
        self.folder = self._shelf.folder if isinstance(self._shelf, FolderShelf) else None
        trainer = Trainer(
            run, experts.training, spec, self.network, _DTYPES[experts.precision], experts.seed, experts.compiled
        )
        self._line: tuple[Tensor, Tensor] | None = None
        if self._missing():
            growth = Growth(run, trainer, self._shelf, epochs, experts.together)
            if run.shared.rehearsal is not None:
                self._line = growth.rehearse(self._missing())
            else:
                with self._told_if_stopped(), self._shelf.reserved(run.shared.give_way):
                    growth.train(self._missing())  # asked again: who held the lock may have made them

    def __repr__(self) -> str:
        return f"Trajectories({self.count} experts of {self.epochs} epochs, in {self.folder or 'memory'})"

    @classmethod
    def of(cls, run: Run, experts: Experts, spec: NetworkSpec, epochs: int) -> "Trajectories":
        """Those of a run, found or trained at the first call; arguments and errors as in `Trajectories`."""
        made = _made.setdefault(run.shared, {})
        known = made.get((experts, spec))
        if known is None or known.epochs < epochs:
            known = made[experts, spec] = cls(run, experts, spec, epochs)
        return known

    def snapshots(self, expert: int, epochs: Sequence[int]) -> Tensor:
        """Parameters (len(epochs), P), float32 on the run's device, of one expert after so many epochs each.

        Raises:
            InvalidSetting: no such expert, or an epoch beyond `epochs`.
            BadArtifact: its file was removed or damaged since the run began.
        """
        if not 0 <= expert < self.count:
            raise InvalidSetting("expert", expert, f"0 to {self.count - 1}")
        if not epochs or not all(0 <= epoch <= self.epochs for epoch in epochs):
            raise InvalidSetting("epochs", list(epochs), f"at least one, each from 0 to {self.epochs}")
        if self._line is not None and not self._whole(expert):
            start, epoch = self._line
            return torch.stack([start + number * epoch for number in epochs]).to(self._device)
        return torch.stack(self._shelf.rows(expert, epochs)).to(self._device, torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts, on the disk where they are kept there."""
        return sum(map(self._shelf.nbytes, range(self.count)))

    @contextmanager
    def _told_if_stopped(self) -> Iterator[None]:
        """What is kept of experts lies elsewhere than the state of a run: say where, and how much it is."""
        try:
            yield
        except Stopped as error:
            if self.folder is None:
                raise
            done = sum(self._shelf.reached(index) or 0 for index in range(self.count))
            kept = f"{done} epochs of experts, kept in {self.folder}"
            raise Stopped(error.signum, error.iteration, error.path, kept) from None

    def _whole(self, index: int) -> bool:
        reached = self._shelf.reached(index)
        return reached is not None and reached >= self.epochs

    def _missing(self) -> list[int]:
        return [index for index in range(self.count) if not self._whole(index)]


_made: "WeakKeyDictionary[Shared, dict[tuple[Experts, NetworkSpec], Trajectories]]" = WeakKeyDictionary()


def shelf_of(run: Run, experts: Experts, spec: NetworkSpec) -> tuple[FlatNetwork, Shelf]:
    """A network of the experts' make, and where those are kept that a run asks for; see `Trajectories`."""
    network, recipe = _described(run, experts, spec)
    if run.store is None:
        return network, MemoryShelf()
    digest = settings_digest(recipe)
    told = {"experts": digest, "source": run.source.name, **recipe}
    return network, FolderShelf(run.store / "experts" / digest, digest, told, str(run.device))


def _described(run: Run, experts: Experts, spec: NetworkSpec) -> tuple[FlatNetwork, dict[str, Any]]:
    """A network of the experts' make, and all that they depend on."""
    source = run.source
    settings = {
        "version": STORED_AS,
        "network": to_dict(spec),
        "training": experts.training.identity(),
        "precision": experts.precision,
        "seed": experts.seed,
        "images": {
            "fingerprint": source.fingerprint,
            "normalization": source.normalization.identity(),
            "mirror_safe": source.mirror_safe,
        },
    }
    module = run.network(spec, 0, name=f"experts-{settings_digest(settings)}")  # the run knows if it couples batches
    torch.func.replace_all_batch_norm_modules_(module)
    # The name of a network says little where a factory makes it.
    layout = [[name, list(parameter.shape)] for name, parameter in module.named_parameters()]
    return FlatNetwork(module), {**settings, "parameters": layout}
