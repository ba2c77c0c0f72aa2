"""Forms of a synthetic set: what is stored and learned, and how it decodes to images."""

from dsdistill.parameterizations.base import Decoded, Form, Parameterization
from dsdistill.parameterizations.compensated import Compensated
from dsdistill.parameterizations.mirrored import Mirrored
from dsdistill.parameterizations.pixels import Pixels, Plain
from dsdistill.parameterizations.places import places_of
from dsdistill.parameterizations.tiles import Tiled, Tiles

FORMS: dict[str, type[Parameterization]] = {form.key: form for form in (Pixels, Tiles, Mirrored, Compensated)}
"""Closed table: the only classes a saved set may ask for."""

__all__ = [
    "FORMS",
    "Compensated",
    "Decoded",
    "Form",
    "Mirrored",
    "Parameterization",
    "Pixels",
    "Plain",
    "Tiled",
    "Tiles",
    "places_of",
]
