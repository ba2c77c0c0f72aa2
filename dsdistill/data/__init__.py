"""Real images: open them by name, from a folder or from a dataset, and draw from them.

Example:
    >>> import torch
    >>> from dsdistill import data
    >>> source = data.load("digits")
    >>> source.per_class([0, 1], 3, torch.Generator().manual_seed(0)).images.shape
    torch.Size([6, 1, 8, 8])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdistill.data.catalog import LoadRequest, list_datasets, load, published_normalization, register_dataset
    from dsdistill.data.dataset import from_dataset
    from dsdistill.data.duplicates import overlap
    from dsdistill.data.hub import from_hub
    from dsdistill.data.normalize import Normalization
    from dsdistill.data.source import Batch, ImageSource
    from dsdistill.data.whitening import whiten

_NAMES = {
    "Batch": "source",
    "ImageSource": "source",
    "LoadRequest": "catalog",
    "Normalization": "normalize",
    "from_dataset": "dataset",
    "from_hub": "hub",
    "list_datasets": "catalog",
    "load": "catalog",
    "overlap": "duplicates",
    "published_normalization": "catalog",
    "register_dataset": "catalog",
    "whiten": "whitening",
}

__all__ = [
    "Batch",
    "ImageSource",
    "LoadRequest",
    "Normalization",
    "from_dataset",
    "from_hub",
    "list_datasets",
    "load",
    "overlap",
    "published_normalization",
    "register_dataset",
    "whiten",
]


def __getattr__(name: str) -> Any:
    # On first use: processes that decode images import modules of this package which need no torch.
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
