"""How a set was made: enough to make it again."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any


def method_title(settings: Mapping[str, Any]) -> str:
    """What to call a method in tables, by its recorded settings: its class, and for a wrapper what it wraps."""
    base = settings.get("base")
    name = str(settings.get("type", "?"))
    return f"{name}+{method_title(base)}" if isinstance(base, Mapping) and "type" in base else name


@dataclass(frozen=True)
class Recipe:
    """How a set was made: enough to make it again.

    ``method``: class name and all settings; ``source``: name, fingerprint, classes and counts of the real
    data; ``execution``: what else decides the last bits (device type, threads, chunk); ``versions`` of the
    libraries; ``parents``: recipes of the sets this one was derived from; ``notes``: what a reader must know.
    """

    method: dict[str, Any]
    seed: int
    source: dict[str, Any]
    execution: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    parents: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name of the method, with that of the one it wraps: "DM", "FYI+DM"."""
        return method_title(self.method)

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self) | {"parents": list(self.parents), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Recipe":
        """Inverse of `to_json`."""
        return cls(**{**content, "parents": tuple(content["parents"]), "notes": tuple(content["notes"])})


@cache
def _versions() -> dict[str, str]:
    names = ("dsdistill", "torch", "torchvision", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def library_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return dict(_versions())
