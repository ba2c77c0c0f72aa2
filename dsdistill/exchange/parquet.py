"""Parquet as Hugging Face data sets keep it: an image column of PNG bytes and a label column with its names."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdistill.core import storage
from dsdistill.errors import MissingExtra
from dsdistill.exchange.folder import encode_png
from dsdistill.exchange.report import Export, eight_bits, warn_of_learned

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset


def write_parquet(synthetic: "SyntheticDataset", path: Path) -> Export:
    """One file that ``datasets.load_dataset("parquet", data_files=...)`` opens with its features.

    Columns: ``image`` (8 bits), ``label`` (the class it was made for), and ``probabilities`` (K floats) for soft
    labels.

    Raises:
        MissingExtra: the package ``datasets`` is not installed.
    """
    datasets = _library()
    pixels, report = eight_bits(synthetic, path)
    warn_of_learned(synthetic, path)
    _, targets = synthetic.tensors()
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(synthetic.classes))}
    columns: dict[str, Any] = {
        "image": [{"bytes": encode_png(image), "path": None} for image in pixels],
        "label": synthetic.targets,
    }
    if targets.dim() == 2:
        features["probabilities"] = datasets.List(datasets.Value("float32"), length=targets.shape[1])
        columns["probabilities"] = targets.tolist()
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(buffer)
    storage.write_bytes(path, buffer.getvalue())
    return report


def _library() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hub", "writing parquet files") from error
    return datasets
