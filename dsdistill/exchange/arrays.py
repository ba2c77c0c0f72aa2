"""Arrays for other programs: one npz of everything, or the loose ``.pt`` tensors that the field exchanges."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsdistill.core import storage
from dsdistill.exchange.report import Export, warn_of_learned

if TYPE_CHECKING:
    from dsdistill.synthetic import SyntheticDataset

LEARNED_LR = "lr"
"""Name under which a set carries a learned step size."""


def write_npz(synthetic: "SyntheticDataset", path: Path) -> Export:
    """One file: images (M, C, H, W) as networks take them, targets, mean, std, classes; if any, ZCA matrices and lr."""
    import numpy as np

    images, targets = synthetic.tensors()
    arrays: dict[str, Any] = {
        "images": images.numpy(),
        "targets": targets.numpy(),
        "mean": np.array(synthetic.normalization.mean, dtype=np.float64),
        "std": np.array(synthetic.normalization.std, dtype=np.float64),
        "classes": np.array(synthetic.classes),
        **{name: tensor.numpy() for name, tensor in synthetic.normalization.tensors().items()},
    }
    if LEARNED_LR in synthetic.learned:
        arrays[LEARNED_LR] = synthetic.learned[LEARNED_LR].detach().cpu().numpy()
    warn_of_learned(synthetic, path, kept=(LEARNED_LR,))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    storage.write_bytes(path, buffer.getvalue())
    return Export(path, len(images))


def write_pt(synthetic: "SyntheticDataset", path: Path) -> Export:
    """A folder with ``images.pt`` (M, C, H, W), ``labels.pt`` (M,) or (M, K), and ``lr.pt`` where it was learned."""
    images, targets = synthetic.tensors()
    tensors = {"images.pt": images, "labels.pt": targets}
    if LEARNED_LR in synthetic.learned:
        tensors["lr.pt"] = synthetic.learned[LEARNED_LR]
    warn_of_learned(synthetic, path, kept=(LEARNED_LR,))
    with storage.new_folder(path) as folder:
        for name, tensor in tensors.items():
            storage.write_bytes(folder / name, _saved(tensor.detach().cpu().clone()))
    return Export(path, len(images))


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
