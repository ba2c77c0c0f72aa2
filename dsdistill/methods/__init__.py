"""The methods, one file per paper.

`list_methods`, `get_method` and `create_method` also find the methods that other packages declare as entry
points in the group ``dsdistill.methods``.
"""

from typing import TYPE_CHECKING, Any

from dsdistill.core.config import check_names
from dsdistill.core.registry import Registry
from dsdistill.engine import Synthesizer

if TYPE_CHECKING:
    from dsdistill.methods.dm import DM
    from dsdistill.methods.random_real import RandomReal

TABLE = {
    "DM": "dsdistill.methods.dm:DM",
    "RandomReal": "dsdistill.methods.random_real:RandomReal",
}

_registry: Registry[Synthesizer] = Registry("method", Synthesizer, TABLE, group="dsdistill.methods")  # type: ignore[type-abstract]


def list_methods(pattern: str = "") -> list[str]:
    """Names of all methods, sorted; ``pattern`` is a shell wildcard such as "D*"."""
    return _registry.names(pattern)


def is_method(name: str) -> bool:
    """Whether `create_method` knows the name."""
    return name.lower() in map(str.lower, list_methods())


def get_method(name: str) -> type[Synthesizer]:
    """The class of a method, imported on demand; case does not matter.

    Raises:
        UnknownName: with the nearest known name.
    """
    return _registry.get(name)


def create_method(name: str, **settings: Any) -> Synthesizer:
    """A method with settings: ``create_method("DM", ipc=1)``.

    Raises:
        UnknownName: no such method, or no such setting.
        InvalidSetting: a value has the wrong type or is out of range.
    """
    cls = get_method(name)
    check_names(cls, settings)
    return cls(**settings)


def register_method(cls: type[Synthesizer]) -> type[Synthesizer]:
    """Class decorator: make a method known by its class name for this process."""
    _registry.add(cls.__name__, cls)
    return cls


def __getattr__(name: str) -> Any:
    if name in TABLE:
        return get_method(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DM",
    "RandomReal",
    "create_method",
    "get_method",
    "is_method",
    "list_methods",
    "register_method",
]
