import re
from dataclasses import replace

import pytest
import torch
from methods.cases import CASES, SMALL

from dsdistill import SyntheticDataset, synthesize
from dsdistill.methods import DM, create_method, get_method, is_method, list_methods
from dsdistill.parameterizations import Tiled
from dsdistill.testing import check_synthesizer, toy_source


def test_every_method_has_a_case_under_its_name():
    assert list(CASES) == list_methods()
    for name, method in CASES.items():
        assert type(method) is get_method(name)
        assert type(method).__name__ == name


@pytest.mark.parametrize("name", CASES)
def test_every_method_keeps_the_contract(name):
    assert len(check_synthesizer(CASES[name])) == 9


@pytest.mark.parametrize("name", CASES)
def test_every_method_makes_oblong_grey_images(name, tmp_path):
    source = toy_source(classes=2, per_class=5, shape=(1, 10, 6))
    made = synthesize(CASES[name], source, device="cpu", out=tmp_path / "out", store=tmp_path / "store", progress=False)
    images, _ = made.tensors()
    assert images.shape[1:] == source.shape
    assert torch.isfinite(images).all()
    assert min(made.counts) >= 1
    assert (made.classes, made.normalization) == (source.classes, source.normalization)
    assert torch.equal(SyntheticDataset.load(tmp_path / "out").tensors()[0], images)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": replace(SMALL, norm="batch"), "augmentation": None},
        {"network": replace(SMALL, norm="none", activation="leaky_relu", pooling="max"), "real_batch": 100, "ipc": 1},
        {"on_small_class": "cap", "ipc": 20},
        {"form": Tiled(factor=3, bound=9), "ipc": 3, "on_small_class": "duplicate"},
        {"form": Tiled(factor=2), "network": replace(SMALL, norm="batch")},
    ],
    ids=str,
)
def test_dm_keeps_the_contract_in_all_its_variants(changes):
    assert len(check_synthesizer(replace(CASES["DM"], **changes))) == 9


@pytest.mark.parametrize("name", CASES)
def test_cases_are_small(name):
    assert CASES[name].steps <= 10
    assert CASES[name].ipc <= 2


@pytest.mark.parametrize("name", CASES)
def test_every_method_is_made_by_name(name):
    assert is_method(name.lower())
    made = create_method(CASES[name].title.upper(), ipc=3)  # a wrapper is named with what it wraps
    assert (type(made), made.ipc) == (get_method(name), 3)
    assert type(made).paper


@pytest.mark.parametrize("name", CASES)
def test_presets_name_their_budget_and_their_source(name):
    cls = get_method(name)
    for preset, (source, settings) in cls.presets.items():
        made = cls.preset(preset)
        assert source
        assert settings or "/" not in preset
        if "/" in preset:  # of a dataset and a budget, and maybe a variant
            assert made.ipc == int(re.fullmatch(r"\w+/ipc(\d+)(/\w+)?", preset)[1])


def test_presets_of_dm_are_the_published_settings():
    small = {f"{data}/ipc{ipc}" for data in ("mnist", "fashion_mnist", "svhn") for ipc in (1, 10, 50)}
    large = {f"{data}/ipc{ipc}" for data in ("cifar100", "tiny_imagenet") for ipc in (1, 10, 50)}
    cifar10 = {f"cifar10/ipc{ipc}" for ipc in (1, 10, 50, 100, 200, 500, 1000, 1250)}
    assert set(DM.presets) == small | large | cifar10
    for preset in DM.presets:
        ipc = int(preset.rpartition("ipc")[2])
        lr = 10.0 if ipc >= 100 else 1.0
        assert DM.preset(preset) == DM(ipc=ipc, iterations=20_000, real_batch=256, lr_images=lr, momentum=0.5)
    assert DM.preset("cifar10/ipc10", iterations=5) == DM(ipc=10, iterations=5)


def test_what_methods_share_is_no_method_itself():
    from dsdistill.matching.recovery import Recovery

    with pytest.raises(TypeError, match="abstract"):
        Recovery()
