import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from studies.actors import PROTOCOL, toy_source

from dsdistill.data import ImageSource
from dsdistill.errors import BadData, InvalidSetting, UnknownName
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.studies.cells import Cell, DataReference, Scoring, make_cells, named_methods

TESTS = Path(__file__).resolve().parents[1]
SCORING = Scoring(protocol=PROTOCOL, repeats=2)


def cell(method=None, seed=0, scoring=SCORING, data=None):
    source = toy_source() if data is None else data
    return Cell(DataReference(source).describe(source), method or DM(ipc=2), seed, scoring)


def test_a_key_is_the_same_in_every_process_and_order():
    script = "from studies.test_cells import cell; print(cell().key)"
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == cell().key, done.stderr
    shuffled = dict(reversed(cell().data.items()))
    assert list(shuffled) != list(cell().data)
    assert replace(cell(), data=shuffled).key == cell().key


CHANGES = {
    "seed": lambda: cell(seed=1),
    "ipc": lambda: cell(DM(ipc=3)),
    "a setting": lambda: cell(DM(ipc=2, lr_images=0.5)),
    "a nested setting": lambda: cell(DM(ipc=2, network=NetworkSpec(width=9))),
    "the method": lambda: cell(RandomReal(ipc=2)),
    "the protocol": lambda: cell(scoring=replace(SCORING, protocol=replace(PROTOCOL, lr=0.5))),
    "its network": lambda: cell(scoring=replace(SCORING, protocol=replace(PROTOCOL, network=NetworkSpec()))),
    "repeats": lambda: cell(scoring=replace(SCORING, repeats=3)),
    "the evaluation seed": lambda: cell(scoring=replace(SCORING, seed=5)),
    "baselines": lambda: cell(scoring=replace(SCORING, baselines=())),
    "pixels": lambda: cell(data=toy_source(seed=7)),
    "mirroring": lambda: cell(data=toy_source().with_mirror_safe(False)),
    "whole epochs": lambda: cell(scoring=replace(SCORING, baselines=("whole",), whole_epochs=2)),
    "other whole epochs": lambda: cell(scoring=replace(SCORING, baselines=("whole",), whole_epochs=3)),
}


def test_whatever_decides_a_result_changes_the_key():
    keys = {name: change().key for name, change in CHANGES.items()}
    assert len({cell().key, *keys.values()}) == 1 + len(CHANGES), keys


def test_what_decides_nothing_does_not_change_the_key():
    assert cell(scoring=replace(SCORING, seed=0)).key == cell().key  # the evaluation seed is the cell's own
    assert cell(scoring=replace(SCORING, whole_epochs=9)).key == cell().key  # no whole row in this cell
    assert cell(data=toy_source()).key == cell().key


def test_options_that_are_their_defaults_or_say_where_images_lie_are_the_same_data(tmp_path):
    source = toy_source()
    plain = DataReference("digits").describe(source)
    for options in ({"zca": False}, {"root": tmp_path}, {"download": True, "storage": "memory", "holdout": 0.2}):
        assert DataReference("digits", options).describe(source) == plain
    for options in ({"zca": True}, {"holdout": 0.3}, {"image_size": 8}, {"resize": "crop"}):
        assert DataReference("digits", options).describe(source) != plain
    json.dumps(plain)


def test_the_last_bits_of_whitening_matrices_are_no_part_of_the_key():
    images, targets = toy_source().images, toy_source().targets
    described = []
    for shift in (0, 1):  # other matrices under the same settings
        normalization = toy_source().normalization.whitened([images + shift])
        source = ImageSource("toy", ("a", "b", "c"), images, targets, normalization=normalization)
        described.append(DataReference(source).describe(source))
    assert described[0] == described[1]
    assert described[0]["normalization"]["kind"] == "zca"


def test_wrong_references_are_refused():
    with pytest.raises(UnknownName, match="unknown option of load 'holdot'; did you mean 'holdout'"):
        DataReference("digits", {"holdot": 0.1})
    with pytest.raises(InvalidSetting, match="this is a source"):
        DataReference(toy_source(), {"zca": True})


def test_a_grid_gives_whole_curves_of_the_first_seed_first_and_the_whole_set_once():
    source = toy_source()
    scoring = replace(SCORING, baselines=("random", "whole"), whole_epochs=4)
    methods = [DM(iterations=3), RandomReal()]
    cells = list(
        make_cells(
            DataReference(source).describe(source), methods, budgets=(5, 1, 5), seeds=(3, 0), scoring=scoring
        ).values()
    )
    order = [(type(one.method).__name__, one.ipc, one.seed) for one in cells]
    curve = [("DM", 1), ("RandomReal", 1), ("DM", 5), ("RandomReal", 5)]
    assert order == [(*one, seed) for seed in (3, 0) for one in curve] + [("RandomReal", 1, 3)]
    assert [one.whole for one in cells] == [False] * 8 + [True]
    assert cells[-1].scoring.whole_epochs == 4
    assert {one.scoring.baselines for one in cells[:-1]} == {("random",)}
    assert cells[0].method == DM(iterations=3, ipc=1)


def test_methods_by_name_and_instance():
    assert named_methods("dm") == [DM()]
    assert named_methods(["DM", RandomReal(ipc=3)]) == [DM(), RandomReal(ipc=3)]
    with pytest.raises(UnknownName, match="did you mean 'DM'"):
        named_methods(["DMM"])
    with pytest.raises(InvalidSetting, match="at least one method"):
        named_methods([])
    with pytest.raises(InvalidSetting, match="instances such as"):
        named_methods([DM])
    with pytest.raises(InvalidSetting, match=r"RandomReal\.ipc = 0"):
        RandomReal().with_ipc(0)


def test_what_would_fail_for_certain_is_refused():
    source = toy_source()
    with pytest.raises(BadData, match="fewer than ipc=13"):
        cell(DM(ipc=13)).check(source)
    with pytest.raises(BadData, match="no test split"):
        cell().check(ImageSource("bare", source.classes, source.images, source.targets))
    deep = replace(SCORING, protocol=replace(PROTOCOL, network=NetworkSpec(depth=9)))
    with pytest.raises(InvalidSetting, match="depth"):
        cell(scoring=deep).check(source)
    cell().check(source)
    assert torch.equal(source.targets, toy_source().targets)
