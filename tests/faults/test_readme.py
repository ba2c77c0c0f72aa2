"""The table of faults names tests that exist, and every test of this folder."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
TABLE = (FOLDER / "README.md").read_text(encoding="utf-8")


def defined(path):
    return set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_test_of_the_table_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)
    assert len(named) > 80
    assert [f"{file}::{name}" for file, name in named if name not in defined(FOLDER.parent / file)] == []


def test_every_row_names_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert [row for row in rows if "::test_" not in row] == []


def test_every_file_of_the_folder_is_in_the_table():
    files = {path.name for path in FOLDER.glob("test_*.py")} - {Path(__file__).name}
    assert [name for name in sorted(files) if f"faults/{name}::" not in TABLE] == []
