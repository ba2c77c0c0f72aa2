"""The methods, one file per paper.

`list_methods`, `get_method` and `create_method` also find the methods that other packages declare as entry
points in the group ``dsdistill.methods``.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dsdistill.core.config import check_complete, check_names
from dsdistill.core.registry import Registry
from dsdistill.engine import Synthesizer
from dsdistill.errors import InvalidSetting

if TYPE_CHECKING:
    from dsdistill.methods.ast import AST
    from dsdistill.methods.cda import CDA
    from dsdistill.methods.cvdd import CVDD
    from dsdistill.methods.d4m import D4M
    from dsdistill.methods.datadam import DataDAM
    from dsdistill.methods.datm import DATM
    from dsdistill.methods.dc import DC
    from dsdistill.methods.diffusion import Diffusion
    from dsdistill.methods.dm import DM
    from dsdistill.methods.dsa import DSA
    from dsdistill.methods.evlf import EVLF
    from dsdistill.methods.ftd import FTD
    from dsdistill.methods.fyi import FYI
    from dsdistill.methods.herding import Herding
    from dsdistill.methods.idc import IDC
    from dsdistill.methods.infer import INFER
    from dsdistill.methods.kcenter import KCenter
    from dsdistill.methods.kmeans import KMeans
    from dsdistill.methods.mgd3 import MGD3
    from dsdistill.methods.minimax import Minimax
    from dsdistill.methods.mtt import MTT
    from dsdistill.methods.ncfm import NCFM
    from dsdistill.methods.nrrdd import NRRDD
    from dsdistill.methods.random_real import RandomReal
    from dsdistill.methods.rded import RDED
    from dsdistill.methods.sre2l import SRe2L

TABLE = {
    "AST": "dsdistill.methods.ast:AST",
    "CDA": "dsdistill.methods.cda:CDA",
    "CVDD": "dsdistill.methods.cvdd:CVDD",
    "D4M": "dsdistill.methods.d4m:D4M",
    "DATM": "dsdistill.methods.datm:DATM",
    "DataDAM": "dsdistill.methods.datadam:DataDAM",
    "DC": "dsdistill.methods.dc:DC",
    "DM": "dsdistill.methods.dm:DM",
    "DSA": "dsdistill.methods.dsa:DSA",
    "Diffusion": "dsdistill.methods.diffusion:Diffusion",
    "EVLF": "dsdistill.methods.evlf:EVLF",
    "FTD": "dsdistill.methods.ftd:FTD",
    "FYI": "dsdistill.methods.fyi:FYI",
    "Herding": "dsdistill.methods.herding:Herding",
    "IDC": "dsdistill.methods.idc:IDC",
    "INFER": "dsdistill.methods.infer:INFER",
    "KCenter": "dsdistill.methods.kcenter:KCenter",
    "KMeans": "dsdistill.methods.kmeans:KMeans",
    "MGD3": "dsdistill.methods.mgd3:MGD3",
    "MTT": "dsdistill.methods.mtt:MTT",
    "Minimax": "dsdistill.methods.minimax:Minimax",
    "NCFM": "dsdistill.methods.ncfm:NCFM",
    "NRRDD": "dsdistill.methods.nrrdd:NRRDD",
    "RDED": "dsdistill.methods.rded:RDED",
    "RandomReal": "dsdistill.methods.random_real:RandomReal",
    "SRe2L": "dsdistill.methods.sre2l:SRe2L",
}

_registry: Registry[Synthesizer] = Registry("method", Synthesizer, TABLE, group="dsdistill.methods")  # type: ignore[type-abstract]


def list_methods(pattern: str = "") -> list[str]:
    """Names of all methods, sorted; ``pattern`` is a shell wildcard such as "D*"."""
    return _registry.names(pattern)


def is_method(name: str) -> bool:
    """Whether `create_method` knows the name, or every part of a name such as "FYI+DM"."""
    known = {method.lower() for method in list_methods()}
    return all(part.lower() in known for part in name.split("+"))


def get_method(name: str) -> type[Synthesizer]:
    """The class of a method, imported on demand; case does not matter.

    Raises:
        UnknownName: with the nearest known name.
    """
    return _registry.get(name)


def create_method(name: str, **settings: Any) -> Synthesizer:
    """A method with settings: ``create_method("DM", ipc=1)``.

    "FYI+DM" is a method wrapped by another; settings go to the innermost, ``create_method("FYI+DM", ipc=1)``, and those
    that only the wrapper has (``store``) to the wrapper.

    Raises:
        UnknownName: no such method, or no such setting.
        InvalidSetting: a value has the wrong type or is out of range, or one without default is missing.
    """
    *wrappers, innermost = name.split("+")
    cls, outers = get_method(innermost), [get_method(wrapper) for wrapper in wrappers]
    inner = {field.name for field in fields(cls)}
    taken = [{field.name for field in fields(outer)} - inner - {"base"} for outer in outers]
    around = [{key: settings.pop(key) for key in sorted(names & settings.keys())} for names in taken]
    check_names(cls, settings)
    if "base" not in settings and any(field.name == "base" for field in fields(cls)):
        raise InvalidSetting(f"{cls.__name__}.base", None, f"name the method to wrap: {cls.__name__}+DM")
    check_complete(cls, settings)
    method = cls(**settings)
    for outer, own in zip(reversed(outers), reversed(around), strict=True):
        check_names(outer, ["base"])
        method = outer(base=method, **own)  # type: ignore[call-arg]  # it has that field
    return method


def register_method(cls: type[Synthesizer]) -> type[Synthesizer]:
    """Class decorator: make a method known by its class name for this process."""
    _registry.add(cls.__name__, cls)
    return cls


def __getattr__(name: str) -> Any:
    if name in TABLE:
        return get_method(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AST",
    "CDA",
    "CVDD",
    "D4M",
    "DATM",
    "DC",
    "DM",
    "DSA",
    "EVLF",
    "FTD",
    "FYI",
    "IDC",
    "INFER",
    "MGD3",
    "MTT",
    "NCFM",
    "NRRDD",
    "RDED",
    "DataDAM",
    "Diffusion",
    "Herding",
    "KCenter",
    "KMeans",
    "Minimax",
    "RandomReal",
    "SRe2L",
    "create_method",
    "get_method",
    "is_method",
    "list_methods",
    "register_method",
]
