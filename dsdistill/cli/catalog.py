"""Verbs that tell what there is: methods, show."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import Verb, say
from dsdistill.errors import InvalidSetting

if TYPE_CHECKING:
    from dsdistill.core.config import FieldInfo
    from dsdistill.engine import Preset


_IN_FULL = 5  # classes that one setting can be of, of which all settings are shown


def _methods_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", type=str, nargs="?", default="", help='Wildcard, e.g. "D*".')


def _methods(config: Namespace) -> Any:
    from dsdistill.methods import get_method, list_methods

    table = {name: get_method(name).paper for name in list_methods(config.pattern or "")}
    width = max(map(len, table), default=0)
    say(config, "\n".join(f"{name.ljust(width)}  {paper}" for name, paper in table.items()) or "no method of that name")
    return table


def _show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("method", type=str, help="Name of a method, or of a setting of one: EVLF.models.weights.")


def _show(config: Namespace) -> Any:
    from dsdistill.core.config import describe, inner_classes, to_dict
    from dsdistill.methods import get_method

    name, *inner = config.method.rpartition("+")[2].split(".")  # of "FYI+DM", what has settings and presets
    cls = get_method(name)
    if inner:
        return _show_setting(config, cls, inner)
    settings = describe(cls)
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    needs = f"Of its network it needs: {', '.join(cls.network_needs)}" if cls.network_needs else ""
    lines = [f"{cls.__name__}: {summary}", f"Paper: {cls.paper}", *([needs] if needs else []), ""]
    lines += _setting_lines(settings)
    nested = [field.name for field in settings if inner_classes(cls, field.name)]
    if nested:
        lines += ["", f"Settings of settings: dsdistill show {cls.__name__}.{nested[0]}"]
        lines[-1] += f" ({', '.join(nested[1:])} likewise)" if nested[1:] else ""
    if cls.presets:
        first = next(iter(cls.presets))
        lines += ["", f"Presets, as --preset {first} or dd.methods.{cls.__name__}.preset({first!r}):"]
        lines += _preset_lines(cls.presets, {field.name: field.default for field in settings})
    say(config, "\n".join(lines))
    return {
        "name": cls.__name__,
        "summary": summary,
        "paper": cls.paper,
        "network_needs": list(cls.network_needs),
        "settings": _as_json(settings),
        "presets": {
            name: {"source": source, "settings": to_dict(changes)} for name, (source, changes) in cls.presets.items()
        },
    }


def _show_setting(config: Namespace, cls: type, path: Sequence[str]) -> Any:
    """The classes that a setting can be of, with their settings."""
    from dsdistill.core.config import check_names, describe, inner_classes

    kinds = {cls.__name__: cls}
    for depth, name in enumerate(path):
        having = [kind for kind in kinds.values() if name in {field.name for field in fields(kind)}]
        for kind in [] if having else kinds.values():
            check_names(kind, [name])
        kinds = {key: kind for one in having for key, kind in inner_classes(one, name).items()}
        if not kinds:
            place = ".".join((cls.__name__, *path[: depth + 1]))
            raise InvalidSetting("show", place, f"a setting that has settings: {place} is {_type_of(having[0], name)}")
    place, lines, told = ".".join(path), [], []
    for kind in kinds.values():
        settings, whole = describe(kind), len(kinds) <= _IN_FULL
        summary = (inspect.getdoc(kind) or "").splitlines()[0]
        lines += ["", f"{kind.__name__}: {summary}", *(["", *_setting_lines(settings)] if whole and settings else [])]
        told.append({"name": kind.__name__, "summary": summary, "settings": _as_json(settings)})
    how = f"As --method.{place}.NAME VALUE, in a sweep as --set {place}.NAME=VALUE"
    say(config, "\n".join([f"{cls.__name__}.{place}", *lines, "", how]))
    return {"setting": f"{cls.__name__}.{place}", "classes": told}


def _type_of(cls: type, name: str) -> str:
    from dsdistill.core.config import describe

    return next(field.type for field in describe(cls) if field.name == name)


def _setting_lines(settings: "Sequence[FieldInfo]") -> list[str]:
    width, lines = max((len(field.name) for field in settings), default=0), []
    for field in settings:
        default = "required" if field.default is MISSING else f"default {_brief(field.default)}"
        lines += [
            f"  {field.name.ljust(width)}  {field.type}, {default}",
            f"  {' ' * width}  {' '.join(field.doc.split())}",
        ]
    return lines


def _as_json(settings: "Sequence[FieldInfo]") -> list[dict[str, Any]]:
    from dsdistill.core.config import to_dict

    return [
        {
            "name": field.name,
            "type": field.type,
            "required": field.default is MISSING,
            "default": None if field.default is MISSING else to_dict(field.default),
            "doc": field.doc,
        }
        for field in settings
    ]


def _changes(key: str, value: Any, default: Any) -> str:
    """A setting of a preset; of one that has settings itself, those that differ from the default's."""
    if type(value) is not type(default) or not is_dataclass(value) or isinstance(value, type):
        return f"{key}={_brief(value)}"
    inner = [(field.name, getattr(value, field.name), getattr(default, field.name)) for field in fields(value)]
    return ", ".join(_changes(f"{key}.{name}", new, old) for name, new, old in inner if new != old)


def _preset_lines(presets: "Mapping[str, Preset]", defaults: "Mapping[str, Any]") -> list[str]:
    """What each preset sets, below where that was published."""
    width = max(map(len, presets))
    by_source: dict[str, list[str]] = {}
    for name, (source, changes) in presets.items():
        told = ", ".join(_changes(key, value, defaults.get(key)) for key, value in changes.items()) or "the defaults"
        by_source.setdefault(source, []).append(f"    {name.ljust(width)}  {told}")
    return [line for source, lines in by_source.items() for line in (f"  from {source}", *lines)]


def _brief(value: Any) -> str:
    """A setting without what in it is default: ``NetworkSpec(norm='batch')``."""
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    changed = {
        field.name: getattr(value, field.name) for field in fields(value) if getattr(value, field.name) != field.default
    }
    return f"{type(value).__name__}({', '.join(f'{name}={_brief(item)}' for name, item in changed.items())})"


VERBS = {
    "methods": Verb(
        "List the methods.",
        "  dsdistill methods\n  dsdistill methods 'D*' --json",
        _methods_arguments,
        _methods,
    ),
    "show": Verb(
        "Explain a method: its settings, defaults, presets and paper.",
        "  dsdistill show DM\n  dsdistill show EVLF.models.weights",
        _show_arguments,
        _show,
    ),
}
