import pytest
from studies.actors import PROTOCOL, toy_source

from dsdistill import studies


@pytest.fixture
def grid(tmp_path):
    """A small grid in this process; arguments replace the usual ones."""

    def run(methods=("RandomReal",), data=None, **changes):
        usual = {"ipc": (1, 2), "seeds": 2, "protocol": PROTOCOL, "repeats": 2, "workers": 1, "devices": ["cpu"]}
        source = toy_source() if data is None else data
        return studies.grid(source, methods, **{**usual, "out": tmp_path / "study", **changes})

    return run
