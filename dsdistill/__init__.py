"""dsdistill: distil a labelled image set into a few synthetic images per class, and score the result.

>>> import dsdistill as dd
>>> source = dd.data.load("digits")
>>> synthetic = dd.synthesize(dd.methods.RandomReal(ipc=1), source)
>>> synthetic.ipc, len(synthetic)
(1, 10)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdistill import (
        augmentations,
        data,
        errors,
        evaluation,
        experts,
        generative,
        methods,
        networks,
        relabelling,
        studies,
        testing,
    )
    from dsdistill.engine import Estimate, Synthesizer, estimate, synthesize
    from dsdistill.errors import DistillError
    from dsdistill.evaluation import EvaluationProtocol, EvaluationResult, evaluate
    from dsdistill.experts import Committee, train_experts, train_teachers
    from dsdistill.methods import create_method, list_methods
    from dsdistill.published import import_published
    from dsdistill.relabelling import LabelSet, relabel
    from dsdistill.synthetic import SyntheticDataset

__version__ = "0.1.0"

_MODULES = (
    "augmentations",
    "data",
    "errors",
    "evaluation",
    "experts",
    "generative",
    "methods",
    "networks",
    "relabelling",
    "studies",
    "testing",
)
_NAMES = {
    "Committee": "experts",
    "DistillError": "errors",
    "Estimate": "engine",
    "EvaluationProtocol": "evaluation",
    "EvaluationResult": "evaluation",
    "LabelSet": "relabelling",
    "Synthesizer": "engine",
    "SyntheticDataset": "synthetic",
    "create_method": "methods",
    "estimate": "engine",
    "evaluate": "evaluation",
    "import_published": "published",
    "list_methods": "methods",
    "relabel": "relabelling",
    "synthesize": "engine",
    "train_experts": "experts",
    "train_teachers": "experts",
}

__all__ = [
    "Committee",
    "DistillError",
    "Estimate",
    "EvaluationProtocol",
    "EvaluationResult",
    "LabelSet",
    "Synthesizer",
    "SyntheticDataset",
    "__version__",
    "augmentations",
    "create_method",
    "data",
    "errors",
    "estimate",
    "evaluate",
    "evaluation",
    "experts",
    "generative",
    "import_published",
    "list_methods",
    "methods",
    "networks",
    "relabel",
    "relabelling",
    "studies",
    "synthesize",
    "testing",
    "train_experts",
    "train_teachers",
]


def __getattr__(name: str) -> Any:
    # Everything is imported on first use, so that `import dsdistill` and the command line's --help stay quick.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
