import importlib.metadata
import logging
import sys
from collections import Counter, OrderedDict, defaultdict

import pytest

from dsdistill.core.registry import Registry
from dsdistill.errors import DistillError, UnknownName

TABLE = {
    "Ordered": "collections:OrderedDict",
    "Tally": "collections:Counter",
    "Absent": "no_such_module_anywhere:Thing",
    "WrongBase": "collections:deque",
    "NoClass": "math:pi",
}


@pytest.fixture
def registry():
    return Registry("mapping", dict, TABLE, group="dsdistill.tests.none")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with entry points, as pip would, and gives a registry that reads them."""

    def install(lines, table=TABLE, name="plugin"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("[dsdistill.tests.group]\n" + lines)
        monkeypatch.syspath_prepend(str(tmp_path))
        return Registry("mapping", dict, table, group="dsdistill.tests.group")

    return install


def test_names_are_sorted_without_regard_to_case(registry):
    assert registry.names() == ["Absent", "NoClass", "Ordered", "Tally", "WrongBase"]
    assert Registry("x", dict, {"b": "m:b", "A": "m:A", "C": "m:C"}, group="none").names() == ["A", "b", "C"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", 5),
        ("*a*", 4),
        ("T*", 1),
        ("t*", 1),
        ("tally", 1),
        ("?ally", 1),
        ("[ot]*", 2),
        ("all", 0),
        ("z*", 0),
    ],
)
def test_patterns_are_shell_wildcards_without_regard_to_case(pattern, found, registry):
    assert len(registry.names(pattern)) == found


def test_classes_are_imported_only_when_asked_for(registry):
    assert registry.get("Tally") is Counter
    assert registry.get("oRDERED") is OrderedDict
    assert "no_such_module_anywhere" not in sys.modules
    with pytest.raises(DistillError, match="mapping 'Absent' cannot be loaded from no_such_module_anywhere:Thing"):
        registry.get("Absent")


def test_unknown_names_meet_the_nearest(registry):
    with pytest.raises(
        UnknownName, match=r"unknown mapping 'tallly'; did you mean 'Tally'\? Known: Absent, "
    ) as caught:
        registry.get("tallly")
    assert (caught.value.kind, caught.value.name) == ("mapping", "tallly")
    assert caught.value.known == ("Absent", "NoClass", "Ordered", "Tally", "WrongBase")
    with pytest.raises(UnknownName, match=r"unknown mapping 'zzzz'\. Known: "):
        registry.get("zzzz")
    with pytest.raises(UnknownName, match=r"Known: none\."):
        Registry("x", dict, {}, group="none").get("y")


@pytest.mark.parametrize("name", ["WrongBase", "NoClass"])
def test_entries_of_another_base_are_refused(name, registry):
    with pytest.raises(DistillError, match=rf"mapping '{name}' is .*, not a subclass of dict"):
        registry.get(name)


class Mine(dict):
    pass


def test_a_class_can_be_added_for_this_process(registry):
    registry.add("Mine", Mine)
    registry.add("Mine", Mine)
    assert registry.get("mine") is Mine
    assert "Mine" in registry.names("m*")
    assert "Mine" not in Registry("mapping", dict, TABLE, group="dsdistill.tests.none").names()


@pytest.mark.parametrize("name", ["Ordered", "Mine", "ordered", "MINE"])
def test_a_taken_name_is_refused_in_any_case(name, registry):
    registry.add("Mine", Mine)
    with pytest.raises(DistillError, match=rf"mapping '{name}' is registered already"):
        registry.add(name, defaultdict)
    assert registry.get("Ordered") is OrderedDict
    assert registry.get("Mine") is Mine


@pytest.mark.parametrize("entry", [list, Mine(), "collections:Counter"])
def test_only_subclasses_can_be_added(entry, registry):
    with pytest.raises(DistillError, match="not a subclass of dict"):
        registry.add("Wrong", entry)
    assert "Wrong" not in registry.names()


def test_other_packages_add_theirs_through_entry_points(install):
    registry = install("Default = collections:defaultdict\nOddOne = collections:deque\n")
    assert registry.names("[do]*") == ["Default", "OddOne", "Ordered"]
    assert registry.get("default") is defaultdict
    with pytest.raises(DistillError, match="not a subclass of dict"):
        registry.get("OddOne")
    with pytest.raises(DistillError, match="registered already"):
        registry.add("Default", Mine)


def test_ours_win_a_clash_with_a_warning(install, caplog):
    registry = install("Tally = collections:OrderedDict\nOrdered = collections:OrderedDict\n")
    with caplog.at_level(logging.WARNING, logger="dsdistill"):
        assert registry.get("Tally") is Counter
    (record,) = caplog.records  # nothing is said of an entry that equals ours
    assert record.getMessage() == "mapping 'Tally' of collections:OrderedDict is hidden by the built-in one"


def test_ours_win_a_clash_in_any_case(install, caplog):
    registry = install("tally = collections:OrderedDict\n")
    assert registry.get("tally") is registry.get("Tally") is Counter
    assert registry.names("tally") == ["Tally"]
    assert "hidden by the built-in one" in caplog.text


def test_entry_points_of_other_groups_are_none_of_ours(install):
    install("Default = collections:defaultdict\n")
    assert Registry("mapping", dict, TABLE, group="dsdistill.tests.other").names() == sorted(TABLE, key=str.lower)
    assert importlib.metadata.entry_points(group="dsdistill.tests.group").names == {"Default"}


def test_a_broken_entry_point_names_itself_and_spoils_no_other(install):
    registry = install("Broken = no_such_module_anywhere:Thing\nGone = collections:NoSuchThing\n")
    assert "Broken" in registry.names()
    assert registry.get("Tally") is Counter
    for name in ("Broken", "Gone"):
        with pytest.raises(DistillError, match=name):
            registry.get(name)
