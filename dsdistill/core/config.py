"""Settings as frozen dataclasses: checked when made, documented where declared, plain JSON on disk.

A settings class is a standard ``@dataclass(frozen=True, kw_only=True)`` whose fields carry their range in
the type and their documentation in a string below::

    ipc: Annotated[int, Ge(1)] = 10
    \"\"\"Synthetic images per class.\"\"\"

`validate` checks types and ranges (pydantic does the work), `to_dict` and `from_dict` convert to and from
plain containers, `describe` lists the fields for humans.
"""

import dataclasses
import hashlib
import inspect
import json
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import docstring_parser
from pydantic import ConfigDict, TypeAdapter, ValidationError

from dsdistill.errors import InvalidSetting, UnknownName

T = TypeVar("T")
TYPE_KEY = "type"


@dataclass(frozen=True)
class FieldInfo:
    """One setting as shown to a human: all strings but the default."""

    name: str
    type: str
    default: Any
    doc: str


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _adapters(cls: type) -> dict[str, TypeAdapter[Any]]:
    # A dataclass-typed field is compared with isinstance: its own __post_init__ has checked it already.
    def adapter(hint: Any) -> TypeAdapter[Any]:
        if dataclasses.is_dataclass(hint):
            return TypeAdapter(typing.cast(Any, hint), config=None)
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False))

    return {name: adapter(hint) for name, hint in _hints(cls).items()}


def validate(settings: Any) -> None:
    """Check every field of a dataclass instance against its annotation; an int given for a float is converted.

    Call it from ``__post_init__``.

    Raises:
        InvalidSetting: naming class and field, the value, and what is allowed.
    """
    cls = type(settings)
    for name, adapter in _adapters(cls).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(settings, name)
        try:
            checked = adapter.validate_python(value, strict=True)  # strict: no dataclass is made of a mapping
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise InvalidSetting(f"{cls.__name__}.{name}", value, problem[:1].lower() + problem[1:]) from None
        if type(checked) is not type(value):
            object.__setattr__(settings, name, checked)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any library (numpy's too) as Python's own, so that equal numbers give equal runs and files.

    Raises:
        InvalidSetting: no integer (a bool is none), or below ``least``.
    """
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or (least is not None and whole < least):
        raise InvalidSetting(name, value, "an integer" if least is None else f"an integer of at least {least}")
    return whole


def require_instance(name: str, value: Any, kind: type | tuple[type, ...], mend: str) -> None:
    """Refuse an argument of another type, before an attribute that it lacks is asked for.

    Raises:
        InvalidSetting: naming the argument, the value and the mend.
    """
    if not isinstance(value, kind):
        raise InvalidSetting(name, value, mend)


def to_dict(value: Any) -> Any:
    """Plain JSON containers; each dataclass becomes a mapping with its class name under ``"type"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {TYPE_KEY: type(value).__name__, **plain}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a setting of type {type(value).__name__} cannot be written as JSON: {value!r}")


def settings_digest(value: Any) -> str:
    """16 hexadecimal digits that tell settings (or containers of them) apart; the same in every process."""
    return hashlib.sha256(json.dumps(to_dict(value), sort_keys=True).encode()).hexdigest()[:16]


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Rebuild a settings object written by `to_dict`.

    Raises:
        UnknownName: a key is no field of the class, or a ``"type"`` names no known class.
        InvalidSetting: a value has the wrong type or is out of range, or one without default is missing.
    """
    if not isinstance(data, Mapping):
        raise InvalidSetting(cls.__name__, data, "its settings by name")
    named = str(data.get(TYPE_KEY, cls.__name__))
    known = {name: child for name, child in _subclasses(cls).items() if not inspect.isabstract(child)}
    actual = known.get(named)
    if actual is None:
        raise UnknownName(cls.__name__, named, sorted(known))
    hints = _hints(actual)  # type: ignore[arg-type]  # a class is hashable
    arguments = {}
    for key, value in data.items():
        if key == TYPE_KEY:
            continue
        if key not in hints:
            raise UnknownName(f"setting of {actual.__name__}", key, sorted(hints))
        arguments[key] = _revive(hints[key], value)
    check_complete(actual, arguments)
    return actual(**arguments)


def check_complete(cls: type, names: typing.Container[str]) -> None:
    """Refuse to make settings of which one without a default is not among ``names``.

    Raises:
        InvalidSetting: for the first that is missing.
    """
    for field in dataclasses.fields(cls):
        if _default(field) is dataclasses.MISSING and field.name not in names:
            raise InvalidSetting(f"{cls.__name__}.{field.name}", None, "it has no default: give a value")


def check_names(cls: type, names: typing.Iterable[str]) -> None:
    """Refuse names that are no field of a settings class, with the nearest valid one.

    Raises:
        UnknownName: for the first unknown name.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            raise UnknownName(f"setting of {cls.__name__}", name, known)


def describe(cls: type) -> list[FieldInfo]:
    """The fields of a settings class in order of declaration, with type, default and documentation."""
    docs: dict[str, str] = {}
    for base in reversed(inspect.getmro(cls)):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            docs |= {item.arg_name: item.description or "" for item in parsed.params}
    return [
        FieldInfo(field.name, type_name(_hints(cls)[field.name]), _default(field), docs.get(field.name, ""))
        for field in dataclasses.fields(cls)
    ]


def type_name(hint: Any) -> str:
    """A type as a human writes it: ``int >= 1``, ``'a' | 'b'``, ``NetworkSpec | None``."""
    if typing.get_origin(hint) is typing.Annotated:
        base, *limits = typing.get_args(hint)
        signs = {"Ge": (">=", "ge"), "Gt": (">", "gt"), "Le": ("<=", "le"), "Lt": ("<", "lt")}
        ranges = [
            f"{signs[type(limit).__name__][0]} {getattr(limit, signs[type(limit).__name__][1])}"
            for limit in limits
            if type(limit).__name__ in signs
        ]
        return " ".join([type_name(base), ", ".join(ranges)]).strip()
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(hint))
    if isinstance(hint, type) and not typing.get_args(hint):
        return "None" if hint is type(None) else hint.__name__
    if typing.get_args(hint) and typing.get_origin(hint) not in (tuple, list, dict):
        return " | ".join(type_name(part) for part in typing.get_args(hint))
    return str(hint).replace("typing.", "")


def inner_classes(cls: type, name: str) -> dict[str, type]:
    """Settings classes, by name, of which a setting can be; those of ``Fusion | None`` are {"Fusion": Fusion}."""
    return _inner(_hints(cls)[name])


def default_of(cls: type, name: str) -> Any:
    """The default of a setting, or `dataclasses.MISSING`."""
    return _default(next(field for field in dataclasses.fields(cls) if field.name == name))


def _inner(hint: Any) -> dict[str, type]:
    found: dict[str, type] = {}
    for option in _classes(hint):
        kinds: dict[str, type] = _subclasses(option)
        found |= {name: kind for name, kind in kinds.items() if _is_settings(kind)}
    return found


def _is_settings(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)


def _classes(hint: Any) -> list[type]:
    return [option for option in _options(hint) if isinstance(option, type) and option is not type(None)]


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that there is."""
    return typing.get_args(hint) if typing.get_origin(hint) is not None else (hint,)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _subclasses(cls: type[T]) -> dict[str, type[T]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _subclasses(child)
    return found


def _revive(hint: Any, value: Any) -> Any:
    options = _options(hint)
    if isinstance(value, Mapping):
        classes, known = _classes(hint), _inner(hint)
        if TYPE_KEY in value and classes:
            return from_dict(known.get(str(value[TYPE_KEY]), classes[0]), value)
        if len(known) == 1:
            return from_dict(next(iter(known.values())), value)
    if isinstance(value, list) and any(typing.get_origin(option) is tuple for option in (hint, *options)):
        return tuple(value)
    return value
