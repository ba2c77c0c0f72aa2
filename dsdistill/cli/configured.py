"""Settings as they stand in a file of settings."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def as_configured(value: Any) -> Any:
    """A setting as it stands in a file of settings."""
    if is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        arguments = {field.name: as_configured(getattr(value, field.name)) for field in fields(value)}
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
    if isinstance(value, Mapping):
        return {key: as_configured(item) for key, item in value.items()}
    return [as_configured(item) for item in value] if isinstance(value, (list, tuple)) else value
