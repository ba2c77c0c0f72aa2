"""Real images: open them by name, from a folder or from a dataset, and draw from them.

Example:
    >>> import torch
    >>> from dsdistill import data
    >>> source = data.load("digits")
    >>> source.per_class([0, 1], 3, torch.Generator().manual_seed(0)).images.shape
    torch.Size([6, 1, 8, 8])
"""

from dsdistill.data.catalog import LoadRequest, list_datasets, load, register_dataset
from dsdistill.data.dataset import from_dataset
from dsdistill.data.normalize import Normalization
from dsdistill.data.source import Batch, ImageSource

__all__ = [
    "Batch",
    "ImageSource",
    "LoadRequest",
    "Normalization",
    "from_dataset",
    "list_datasets",
    "load",
    "register_dataset",
]
