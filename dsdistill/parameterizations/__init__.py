"""Forms of a synthetic set: what is stored and learned, and how it decodes to images."""

from dsdistill.parameterizations.base import Decoded, Parameterization
from dsdistill.parameterizations.pixels import Pixels

FORMS: dict[str, type[Parameterization]] = {form.key: form for form in (Pixels,)}
"""Closed table: the only classes a saved set may ask for."""

__all__ = ["FORMS", "Decoded", "Parameterization", "Pixels"]
