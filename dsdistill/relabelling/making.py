"""Teachers label a set: `relabel`, epoch by epoch, and what that will cost.

Shen & Xing, FKD (arXiv 2112.01528), and Yin et al., SRe2L (NeurIPS 2023), record views and mixes with the teacher's
logits of them, so that students see again what the teacher saw; Cui et al., CV-DD, let several teachers vote, with the
batch's own statistics in their batch normalisation.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from dsdistill.core import storage
from dsdistill.core.units import shown_duration, shown_size
from dsdistill.engine.observe import StopRequest
from dsdistill.errors import Stopped
from dsdistill.experts import Committee
from dsdistill.protocols import get_protocol
from dsdistill.relabelling.calibration import FerKD
from dsdistill.relabelling.codecs import Codec
from dsdistill.relabelling.growing import Growing
from dsdistill.relabelling.heading import Kind, Records
from dsdistill.relabelling.labeller import Labeller
from dsdistill.relabelling.labelset import LabelSet
from dsdistill.relabelling.plan import Asked
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import TrainingRecipe


@dataclass(frozen=True)
class LabelsEstimate:
    """Cost of labels of ``images`` in each of ``epochs`` passes (1 where static), in ``seconds`` and ``disk`` bytes."""

    kind: str
    images: int
    epochs: int
    device: str
    seconds: float
    disk: int
    free_disk: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)

    def __str__(self) -> str:
        free = "" if self.free_disk is None else f" of {shown_size(self.free_disk)} free"
        return "\n".join(
            (
                f"{self.kind} labels of {self.images} images, {self.epochs} times, on {self.device}:",
                f"  time    {shown_duration(self.seconds)}",
                f"  disk    {shown_size(self.disk)}{free}",
            )
        )


def relabel(
    synthetic: SyntheticDataset,
    committee: Committee,
    recipe: str | TrainingRecipe | None = None,
    *,
    epochs: int | None = None,
    kind: Kind = "replayed",
    codec: str | Codec = "float16",
    teacher_mode: Literal["eval", "batch"] | None = None,
    temperature: float | None = None,
    calibration: FerKD | None = None,
    records: Records | None = None,
    mirror_safe: bool | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    chunk: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> LabelSet:
    """Have teachers label what networks will see while they are trained on a set.

    The same arguments on the same machine give the same bytes. With ``out``, an interrupted call is continued by the
    same call, epoch by epoch; labels that are there already are opened.

    Args:
        synthetic: the set.
        committee: its teachers, on any device; they are moved to ``device``.
        recipe: how networks will be trained, a protocol of `evaluate`, its name, or another recipe: its views, mixes,
            mini-batches and sub-batches are what is labelled. None for static labels.
        epochs: passes to label; None for those of the recipe. One epoch is in memory at a time.
        kind: "replayed": logits of every view. "static": logits of the clean images, once (UFC). "distances": two
            numbers for every view (NRR-DD).
        codec: "float16", "float32", "uint8", "topk", or an instance; see `dsdistill.relabelling.codecs`.
        teacher_mode: "eval": running statistics. "batch": those of each of ``recipe.sub_batches`` parts of a
            mini-batch (batch-specific soft labels). None for that of a protocol, and for "eval" with a plain recipe.
        temperature: of the vote, softmax(performance / temperature). None for the ``vote_temperature`` of a protocol,
            where that is None too and with a plain recipe or none all members are alike.
        calibration: `FerKD` for views that are not worth a teacher's word; of recipes that do not mix, and not beside
            teacher_mode "batch".
        records: "stored", or "drawn" anew at every reading: two thirds less beside few classes, but bound to what
            torch draws from a seed. None: drawn for distances, else stored.
        mirror_safe: whether a mirrored image keeps its class; None for what the set says of its real data.
        seed: every draw is a function of it and the epoch.
        device: as for `synthesize`.
        chunk: images that pass at a time where whole mini-batches fit; None for a size that suits image and device.
        out: folder for the labels; None keeps them in memory.
        progress: show a bar where standard error is a terminal.

    Raises:
        BadData, InvalidSetting, UnknownName, DeviceUnavailable, OutputConflict, OutputLocked: before any work starts.
        OutOfSpace: the disk cannot hold the labels; before any work starts, where that is known by then.
        OutOfMemory: even with one mini-batch at a time.
        Stopped: a signal ended it after the epoch in progress was saved.
    """
    asked = Asked(
        recipe=_named(recipe),
        epochs=epochs,
        kind=kind,
        codec=codec,
        teacher_mode=teacher_mode,
        temperature=temperature,
        calibration=calibration,
        records=records,
        mirror_safe=mirror_safe,
        seed=seed,
    )
    labeller = Labeller.of(synthetic, committee, asked, device, chunk)
    growing = Growing(labeller.heading, None if out is None else Path(out))
    with growing, StopRequest(active=out is not None) as stop:
        names, missing = growing.heading.names, growing.missing
        if missing:
            labeller.tell(len(missing), growing.needed)
        with tqdm(total=len(missing), desc="relabel", unit="epoch", disable=None if progress else True) as bar:
            for name in missing:
                if stop.signum is not None:
                    raise Stopped(stop.signum, len(names) - len(growing.missing), growing.folder or Path())
                growing.add(name, labeller.made(names.index(name)))
                bar.update(1)
        return growing.finished()


def estimate_labels(
    synthetic: SyntheticDataset,
    committee: Committee,
    recipe: str | TrainingRecipe | None = None,
    *,
    device: str | torch.device | None = None,
    chunk: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> LabelsEstimate:
    """Say what `relabel` will cost, by a few mini-batches on this machine; nothing is written. Arguments as there."""
    labeller = Labeller.of(synthetic, committee, Asked(recipe=_named(recipe), **options), device, chunk)
    heading = labeller.heading
    return LabelsEstimate(
        kind=heading.kind,
        images=heading.count,
        epochs=len(heading.names),
        device=labeller.device.type,
        seconds=labeller.seconds() * len(heading.names),
        disk=heading.predicted_bytes(),
        free_disk=None if out is None else storage.free_space(Path(out)),
    )


def _named(recipe: str | TrainingRecipe | None) -> TrainingRecipe | None:
    return get_protocol(recipe) if isinstance(recipe, str) else recipe
