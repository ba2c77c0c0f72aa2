"""How a network is trained on a set before it is tested, and the names under which the published ways are known."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from dsdistill.errors import UnknownName
from dsdistill.networks import NetworkSpec
from dsdistill.training import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol(TrainingRecipe):
    """How a network is trained on a set before it is tested.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    name: str = "custom"
    """Shown beside every score."""
    network: NetworkSpec = NetworkSpec()
    """Network trained from scratch in each repeat."""
    epochs: Annotated[int, Ge(1)] = 1000
    """Passes over the set."""
    learned_lr: bool = False
    """Train on a set that carries a learned step size with that instead of lr, which baselines keep."""
    selection: Literal["last", "validation"] = "last"
    """Which network is tested: the one after the last epoch, or the best on real training images held out for it."""
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of each class of the real training images held out where selection is "validation"."""
    validation_checks: Annotated[int, Ge(1)] = 10
    """How often, evenly over the epochs, a network is then scored on them."""

    teacher_mode: Literal["eval", "batch"] = "eval"
    """Batch norms of teachers take their running statistics, or those of the images they see: of each of the
    ``sub_batches`` of a mini-batch."""
    targets: Literal["views", "images"] = "views"
    """What teachers are asked about: each view that a network sees, or the clean images, once; where these are mixed,
    their logits are."""
    vote_temperature: Annotated[float, Gt(0)] | None = None
    """Several teachers vote by softmax(prior performance / vote_temperature); None: all alike."""

    @property
    def title(self) -> str:
        """The name, and which fields differ from the protocol registered under it."""
        known = _NAMED.get(self.name)
        changed = [
            f.name for f in fields(self) if known is not None and getattr(self, f.name) != getattr(known, f.name)
        ]
        return f"{self.name} (changed: {', '.join(changed)})" if changed else self.name


_NAMED: dict[str, EvaluationProtocol] = {}


def name_protocol(name: str, protocol: EvaluationProtocol) -> None:
    """Make one known by a name, which it gets."""
    _NAMED[name] = replace(protocol, name=name)


def list_protocols(*, cells: bool = False) -> list[str]:
    """Names of the protocols; with ``cells`` also those for one dataset and budget, "cvdd/cifar100/ipc10"."""
    return sorted(name for name in _NAMED if cells or "/" not in name)


def get_protocol(name: str) -> EvaluationProtocol:
    """A named protocol.

    Raises:
        UnknownName: with the nearest known name.
    """
    if name.lower() not in _NAMED:
        stem = name.lower().partition("/")[0]
        cells = [known for known in list_protocols(cells=True) if known.startswith(f"{stem}/")] if "/" in name else []
        raise UnknownName("protocol", name, cells or list_protocols())
    return _NAMED[name.lower()]
