"""A closed table of names, loaded on use, extended by entry points of other packages."""

import fnmatch
import importlib
import logging
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dsdistill.errors import DistillError, UnknownName

T = TypeVar("T")
logger = logging.getLogger("dsdistill")


class Registry(Generic[T]):
    """Names of one kind of class ("method", ...), each imported only when asked for.

    Args:
        kind: what the entries are called in messages.
        base: every entry must be a subclass of this class.
        table: name -> "module:attribute".
        group: entry-point group through which other packages add theirs; ours win a clash, with a warning.
    """

    def __init__(self, kind: str, base: type[T], table: Mapping[str, str], group: str) -> None:
        self.kind, self.base, self.table, self.group = kind, base, dict(table), group
        self._added: dict[str, type[T]] = {}

    @cached_property
    def _locations(self) -> dict[str, str]:
        locations = dict(self.table)
        ours = {name.lower(): value for name, value in self.table.items()}
        for entry in entry_points(group=self.group):
            hidden_by = ours.get(entry.name.lower())
            if hidden_by is None:
                locations.setdefault(entry.name, entry.value)
            elif hidden_by != entry.value:
                logger.warning("%s %r of %s is hidden by the built-in one", self.kind, entry.name, entry.value)
        return locations

    def names(self, pattern: str = "") -> list[str]:
        """Sorted names; ``pattern`` is a shell wildcard, matched without regard to case."""
        known = sorted({*self._locations, *self._added}, key=str.lower)
        return [name for name in known if not pattern or fnmatch.fnmatch(name.lower(), pattern.lower())]

    def add(self, name: str, entry: type[T]) -> None:
        """Register a class for this process; entry points do it for every process.

        Raises:
            DistillError: the name is taken by another class, or the class has the wrong base.
        """
        self._check(name, entry)
        taken = {known.lower() for known in self.names()}
        if name.lower() in taken and self._added.get(name) is not entry:
            raise DistillError(f"{self.kind} {name!r} is registered already; choose another name")
        self._added[name] = entry

    def get(self, name: str) -> type[T]:
        """The class registered as ``name`` (case does not matter).

        Raises:
            UnknownName: with the nearest known name.
            DistillError: the module that should hold it cannot be imported, or holds something else.
        """
        actual = {known.lower(): known for known in self.names()}.get(name.lower())
        if actual is None:
            raise UnknownName(self.kind, name, self.names())
        if actual in self._added:
            return self._added[actual]
        module, _, attribute = self._locations[actual].partition(":")
        try:
            entry: type[T] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise DistillError(f"{self.kind} {actual!r} cannot be loaded from {module}:{attribute}: {error}") from error
        self._check(actual, entry)
        return entry

    def _check(self, name: str, entry: type[T]) -> None:
        if not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise DistillError(f"{self.kind} {name!r} is {entry!r}, not a subclass of {self.base.__name__}")
