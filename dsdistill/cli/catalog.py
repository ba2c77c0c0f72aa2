"""Verbs that tell what there is: methods, show."""

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import Verb, say


def _methods_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", type=str, nargs="?", default="", help='Wildcard, e.g. "D*".')


def _methods(config: Namespace) -> Any:
    from dsdistill.methods import get_method, list_methods

    table = {name: get_method(name).paper for name in list_methods(config.pattern or "")}
    width = max(map(len, table), default=0)
    say(config, "\n".join(f"{name.ljust(width)}  {paper}" for name, paper in table.items()) or "no method of that name")
    return table


def _show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("method", type=str, help="Name of a method.")


def _show(config: Namespace) -> Any:
    from dsdistill.core.config import describe, to_dict
    from dsdistill.methods import get_method

    cls = get_method(config.method)
    fields = describe(cls)
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    needs = f"Of its network it needs: {', '.join(cls.network_needs)}" if cls.network_needs else ""
    lines = [f"{cls.__name__}: {summary}", f"Paper: {cls.paper}", *([needs] if needs else []), ""]
    width = max(len(field.name) for field in fields)
    for field in fields:
        lines += [
            f"  {field.name.ljust(width)}  {field.type}, default {field.default!r}",
            f"  {' ' * width}  {field.doc}",
        ]
    if cls.presets:
        lines += ["", "Presets, as in dd.methods." + f"{cls.__name__}.preset({next(iter(cls.presets))!r}):"]
        lines += [f"  {name}: {settings}" for name, settings in cls.presets.items()]
    say(config, "\n".join(lines))
    settings = [{"name": f.name, "type": f.type, "default": to_dict(f.default), "doc": f.doc} for f in fields]
    presets = {name: dict(preset) for name, preset in cls.presets.items()}
    return {
        "name": cls.__name__,
        "summary": summary,
        "paper": cls.paper,
        "network_needs": list(cls.network_needs),
        "settings": settings,
        "presets": presets,
    }


VERBS = {
    "methods": Verb(
        "List the methods.",
        "  dsdistill methods\n  dsdistill methods 'D*' --json",
        _methods_arguments,
        _methods,
    ),
    "show": Verb(
        "Explain a method: its settings, defaults, presets and paper.",
        "  dsdistill show DM",
        _show_arguments,
        _show,
    ),
}
