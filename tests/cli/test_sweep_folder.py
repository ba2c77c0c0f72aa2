"""What a sweep says of another grid in its folder."""

import logging

from dsdistill.core.config import to_dict
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.studies.folder import StudyFolder


def told(tmp_path, caplog, *grids):
    with caplog.at_level(logging.INFO, "dsdistill"), StudyFolder(tmp_path / "study") as folder:
        for grid in grids:
            folder.describe({"format": "dsdistill.study", "schema_version": 1, **grid})
    return caplog.text.splitlines()


def test_another_grid_is_told_by_the_fields_that_differ(tmp_path, caplog):
    first = {"methods": [to_dict(DM())], "ipc": [1], "cells": ["a" * 64], "versions": {"torch": "1"}}
    wider = [to_dict(DM(network=NetworkSpec(width=8))), to_dict(RandomReal())]
    said = told(tmp_path, caplog, first, {**first, "methods": wider, "cells": ["b" * 64]})
    assert [line.strip() for line in said[1:]] == [
        "methods: ['DM'] -> ['DM', 'RandomReal']",
        "DM.network.width: None -> 8",
    ]


def test_the_same_grid_under_other_versions_is_no_other_grid(tmp_path, caplog):
    grid = {"methods": [to_dict(DM())], "ipc": [1], "versions": {"torch": "1"}}
    assert told(tmp_path, caplog, grid, {**grid, "versions": {"torch": "2"}}) == []


def test_many_differences_are_a_dozen_short_lines(tmp_path, caplog):
    said = told(
        tmp_path, caplog, *({"methods": [], "ipc": [1], **{f"x{i}": f"{v} " * 400 for i in range(30)}} for v in "ab")
    )
    assert len(said) == 1 + 12
    assert said[-1].strip() == "and 19 more"
    assert max(map(len, said[1:])) < 130
