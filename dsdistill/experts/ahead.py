"""Training experts ahead of the runs that use them, and what that costs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsdistill.core import storage
from dsdistill.core.config import require_instance, whole_number
from dsdistill.core.device import default_chunk, resolve_device, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.core.units import shown_duration, shown_size
from dsdistill.data import ImageSource
from dsdistill.data.cache import cache_folder
from dsdistill.engine import Rehearsal, Run, Shared
from dsdistill.engine.observe import StopRequest
from dsdistill.errors import Stopped
from dsdistill.experts.trajectories import Experts, Trajectories, shelf_of
from dsdistill.networks import NetworkSpec


@dataclass(frozen=True)
class ExpertsEstimate:
    """Cost of experts that are not there yet.

    ``count`` experts of ``epochs`` epochs are asked for; ``seconds`` of training, and ``disk``, the bytes that it adds
    to ``folder``; ``free_disk`` bytes are free there.
    """

    count: int
    epochs: int
    device: str
    seconds: float
    disk: int
    free_disk: int
    folder: str

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.count} experts of {self.epochs} epochs on {self.device}, beyond those in {self.folder}:",
                f"  time    {shown_duration(self.seconds)}",
                f"  disk    {shown_size(self.disk)} of {shown_size(self.free_disk)} free",
            )
        )


def train_experts(
    source: ImageSource,
    experts: Experts = Experts(),  # noqa: B008 (frozen)
    network: NetworkSpec = NetworkSpec(),  # noqa: B008 (frozen)
    *,
    epochs: int | None = None,
    store: str | Path | None = None,
    device: str | torch.device | None = None,
    chunk: int | None = None,
) -> Trajectories:
    """Train the experts that methods will ask for, or find them.

    Those of an interrupted call, and those of fewer epochs, are trained on; runs of methods on the same images with
    the same network and `Experts` (but for ``count``) find them in the same ``store``.

    Args:
        source: real images; only the training split is used.
        experts: how many, and how they are trained.
        network: what they are.
        epochs: how far; None for all that the training has.
        store: folder; None for the cache folder (``$DSDISTILL_CACHE``, else ``~/.cache/dsdistill``).
        device: "cpu", "cuda", "cuda:1", "mps", or None for the best one present.
        chunk: images that pass a network at once, None for a size that suits device and image.

    Raises:
        InvalidSetting, DeviceUnavailable, OutputConflict: before any work starts.
        InvalidSetting: an expert stopped being finite.
        Stopped: a signal ended it after whole epochs were saved.
        OutOfSpace: the disk cannot hold them.
    """
    stop = StopRequest(active=True)

    def give_way() -> None:
        if stop.signum is not None:
            raise Stopped(stop.signum, 0, Path())

    run = _run(source, experts, network, Shared(give_way=give_way), store, device, chunk)
    with stop:
        try:
            return Trajectories(run, experts, network, _checked_epochs(epochs, experts))
        except Stopped as error:
            shelf = shelf_of(run, experts, network)[1]
            done = sum(shelf.reached(index) or 0 for index in range(experts.count))
            raise Stopped(error.signum, done, Path(shelf.place), error.kept) from None


def estimate_experts(
    source: ImageSource,
    experts: Experts = Experts(),  # noqa: B008 (frozen)
    network: NetworkSpec = NetworkSpec(),  # noqa: B008 (frozen)
    *,
    epochs: int | None = None,
    store: str | Path | None = None,
    device: str | torch.device | None = None,
    chunk: int | None = None,
) -> ExpertsEstimate:
    """Say what `train_experts` will cost, by a few steps on this machine; nothing is written.

    Arguments, and errors before any work, as there.
    """
    rehearsal = Rehearsal()
    run = _run(source, experts, network, Shared(rehearsal=rehearsal), store, device, chunk)
    made = Trajectories(run, experts, network, _checked_epochs(epochs, experts))
    assert made.folder is not None
    return ExpertsEstimate(
        count=experts.count,
        epochs=made.epochs,
        device=run.device.type,
        seconds=rehearsal.seconds,
        disk=rehearsal.stored,
        free_disk=storage.free_space(made.folder),
        folder=str(made.folder),
    )


def _checked_epochs(epochs: int | None, experts: Experts) -> int:
    return experts.training.epochs if epochs is None else whole_number("epochs", epochs, 1)


def _run(
    source: ImageSource,
    experts: Experts,
    network: NetworkSpec,
    shared: Shared,
    store: str | Path | None,
    device: str | torch.device | None,
    chunk: int | None,
) -> Run:
    """What a method's run would be to its experts, after every check that needs no work."""
    require_instance("source", source, ImageSource, "real images: dd.data.load(...) opens names and folders")
    require_instance("experts", experts, Experts, "which ones: dd.experts.Experts(count=10)")
    require_instance("network", network, NetworkSpec, "what they are: dd.networks.NetworkSpec()")
    resolved = resolve_device(device)
    if store is not None:
        storage.require_folder(Path(store), storage.STORE)
    # What every method that follows them needs: nobody should train for hours what is then refused.
    network.require(("second-order", "deterministic"), source.shape, source.num_classes)
    settle_allocator(resolved)
    return Run(
        source=source.train_only().to(resolved),
        device=resolved,
        rng=Rng(experts.seed, device=resolved),
        classes=tuple(range(source.num_classes)),
        chunk=default_chunk(source.shape, resolved) if chunk is None else whole_number("chunk", chunk, 1),
        shared=shared,
        store=cache_folder() if store is None else Path(store),
    )
