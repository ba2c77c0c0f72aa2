"""Sets that papers publish as loose tensors, as a `SyntheticDataset`."""

from collections.abc import Sequence
from pathlib import Path

from dsdistill import exchange
from dsdistill.data import Normalization
from dsdistill.exchange.arrays import LEARNED_LR
from dsdistill.synthetic import SyntheticDataset


def import_published(
    path: str | Path,
    *,
    normalization: Normalization,
    classes: Sequence[str],
    labels: str | Path | None = None,
    lr: str | Path | None = None,
    which: int = 0,
    source: str = "unknown",
) -> SyntheticDataset:
    """Read ``.pt`` tensors as papers publish them (DC, DSA, DM, MTT, DataDAM and their kin); nothing is executed.

    The files do not say how their pixels were standardised, and guessing wrong costs most of the accuracy: state it.

    Args:
        path: file, or folder with ``images.pt`` and ``labels.pt`` (or ``*_best.pt``).
        normalization: how the pixels were standardised.
        classes: class names in label order.
        labels: file of the labels, where they are apart.
        lr: file of a learned step size.
        which: which set to take where a file holds several.
        source: name of the real data.

    Raises:
        BadArtifact: not readable without executing code, or damaged.
        BadData, InvalidSetting: what it holds does not fit together.
    """
    where = Path(path)
    apart = [Path(extra) if extra is not None else None for extra in (labels, lr)]
    found = exchange.read_published(where, *apart, which=which, num_classes=len(classes))
    targets = found.targets
    if targets.dim() == 2:  # the field keeps logits in such files: probabilities are taken as they are
        sums_to_one = bool(((targets.sum(1) - 1).abs() < 1e-3).all()) and bool((targets >= 0).all())
        targets = targets if sums_to_one else targets.softmax(1)
    return SyntheticDataset.from_tensors(
        found.images,
        targets,
        normalization=normalization,
        classes=classes,
        source=source,
        method={"file": where.name, "which": which},
        learned={} if found.lr is None else {LEARNED_LR: found.lr},
        notes=("imported: how its pixels were standardised is what the importer stated",),
    )
