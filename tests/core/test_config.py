from abc import ABC
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Lt

from dsdistill.core import config
from dsdistill.errors import InvalidSetting, UnknownName


@dataclass(frozen=True)
class Inner:
    """Inner settings."""

    depth: Annotated[int, Ge(1)] | None = None
    """How deep."""

    def __post_init__(self):
        config.validate(self)


class Shape(ABC):  # noqa: B024 (abstract by convention)
    pass


@dataclass(frozen=True)
class Round(Shape):
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer settings."""

    ipc: Annotated[int, Ge(1)] = 10
    """Images per class."""
    lr: Annotated[float, Gt(0), Lt(100)] = 1.0
    """Step size."""
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    shape: Shape | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        config.validate(self)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ipc": 0}, r"Outer\.ipc = 0 .*greater than or equal to 1"),
        ({"ipc": "10"}, r"Outer\.ipc = '10' .*valid integer"),
        ({"ipc": True}, r"Outer\.ipc = True"),
        ({"ipc": 1.5}, r"Outer\.ipc = 1\.5"),
        ({"lr": -1.0}, r"Outer\.lr = -1\.0 .*greater than 0"),
        ({"lr": float("nan")}, r"Outer\.lr = nan"),
        ({"lr": 100}, r"Outer\.lr = 100 .*less than 100"),
        ({"kind": "c"}, r"Outer\.kind = 'c' .*'a' or 'b'"),
        ({"inner": "deep"}, r"Outer\.inner = 'deep'"),
        ({"shape": Inner()}, r"Outer\.shape"),
        ({"names": ("a", 1)}, r"Outer\.names"),
    ],
)
def test_a_bad_value_names_class_field_value_and_range(settings, message):
    with pytest.raises(InvalidSetting, match=message):
        Outer(**settings)


def test_an_integer_is_a_float():
    made = Outer(lr=3)
    assert isinstance(made.lr, float)
    assert made == Outer(lr=3.0)
    assert config.to_dict(made) == config.to_dict(Outer(lr=3.0))


def test_round_trip_keeps_nested_and_abstract_classes():
    made = Outer(inner=Inner(2), shape=Round(0.5), names=("x", "y"))
    plain = config.to_dict(made)
    assert plain["shape"] == {"type": "Round", "radius": 0.5}
    assert config.from_dict(Outer, plain) == made


def test_unknown_names_get_the_nearest_known_one():
    with pytest.raises(UnknownName, match="unknown setting of Outer 'icp'; did you mean 'ipc'"):
        config.from_dict(Outer, {"type": "Outer", "icp": 1})
    with pytest.raises(UnknownName, match="unknown Shape 'Rond'; did you mean 'Round'"):
        config.from_dict(Outer, {"type": "Outer", "shape": {"type": "Rond"}})
    with pytest.raises(UnknownName, match="did you mean 'lr'"):
        config.check_names(Outer, ["ipc", "lrs"])


def test_what_is_no_json_is_refused():
    with pytest.raises(TypeError, match="set cannot be written"):
        config.to_dict({1, 2})


def test_fields_are_described_for_humans():
    described = {field.name: field for field in config.describe(Outer)}
    assert described["ipc"].doc == "Images per class."
    assert described["ipc"].type == "int >= 1"
    assert described["lr"].type == "float > 0, < 100"
    assert described["kind"].type == "'a' | 'b'"
    assert config.describe(Inner)[0].type == "int >= 1 | None"
    assert described["inner"].default == Inner()
