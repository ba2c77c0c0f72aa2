"""Sets that papers publish as loose tensors, as a `SyntheticDataset`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from dsdistill import exchange
from dsdistill.data import Normalization, published_normalization
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.exchange.arrays import LEARNED_LR
from dsdistill.synthetic import SyntheticDataset

PixelSpace = Literal["standardised", "unit"]
_SLACK = 0.01  # beyond 0..1 that rounding may reach
logger = logging.getLogger("dsdistill")


def import_published(
    path: str | Path,
    *,
    normalization: Normalization | str,
    classes: Sequence[str],
    pixels: PixelSpace = "standardised",
    factor: int = 1,
    labels: str | Path | None = None,
    lr: str | Path | None = None,
    which: int | None = None,
    source: str = "unknown",
) -> SyntheticDataset:
    """Read ``.pt`` tensors as papers publish them; nothing is executed.

    The files say neither how their pixels were standardised nor whether they hold tiles, and guessing wrong costs most
    of the accuracy: state it. DC, DSA, DM and DataDAM save standardised pixels; MTT whitened ones where it used ZCA
    (``whiten(source, standardized=False).normalization``); IDC and NCFM save pixels in [0, 1] (``pixels="unit"``) with
    tiles not yet cut (``factor=2`` on small images).

    Args:
        path: file, or folder with ``images.pt`` and ``labels.pt`` (or ``*_best.pt``).
        normalization: how the pixels were standardised, or are to be where they are in [0, 1]; a name stands for what
            was published for that data set.
        classes: class names in label order.
        pixels: "standardised", or "unit" for [0, 1].
        factor: tiles along each side of an image (multi-formation).
        labels: file of the labels, where they are apart.
        lr: file of a learned step size.
        which: which set to take where a file holds several.
        source: name of the real data.

    Raises:
        BadArtifact: not readable without executing code, or damaged.
        BadData, InvalidSetting: what it holds does not fit together.
    """
    if pixels not in get_args(PixelSpace):
        raise InvalidSetting("pixels", pixels, f"one of {', '.join(get_args(PixelSpace))}")
    if isinstance(normalization, str):
        normalization = published_normalization(normalization)
    where = Path(path)
    apart = [Path(extra) if extra is not None else None for extra in (labels, lr)]
    found = exchange.read_published(where, *apart, which=which, num_classes=len(classes))
    images = found.images
    if pixels == "unit":
        low, high = float(images.min()), float(images.max())
        if low < -_SLACK or high > 1 + _SLACK:
            raise BadData(f"{where}: pixels reach from {low:.3g} to {high:.3g}, not 0 to 1: they were standardised")
        images = normalization.standardize(images)
    elif bool((images >= 0).all()) and bool((images <= 1).all()):
        logger.warning("%s: all pixels lie in 0..1; if they were not standardised, say pixels='unit'", where)
    return SyntheticDataset.from_tensors(
        images,
        _probabilities(found.targets),
        normalization=normalization,
        classes=classes,
        factor=factor,
        source=source,
        method={"file": where.name, "which": which},
        learned={} if found.lr is None else {LEARNED_LR: found.lr},
        notes=("imported: how its pixels were standardised, and whether it holds tiles, is what the importer stated",),
    )


def _probabilities(targets: Tensor) -> Tensor:
    """Classes and probabilities as they are; logits, which learned labels are published as, as probabilities."""
    if targets.dim() == 1:
        return targets
    sums_to_one = bool(((targets.sum(1) - 1).abs() < 1e-3).all()) and bool((targets >= 0).all())
    return targets if sums_to_one else targets.softmax(1)
