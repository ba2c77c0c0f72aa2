"""FYI: what the wrapper promises whatever it wraps (section and figures of the paper: X(S) = [S ; flip(S)])."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from methods.stepping import begin, run_of

import dsdistill as dd
from dsdistill import synthesize
from dsdistill.cli.main import main
from dsdistill.core.config import from_dict, to_dict
from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.experts import Experts, PlainTraining
from dsdistill.methods import DC, DM, DSA, FYI, IDC, MTT, NCFM, DataDAM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Plain, Tiled
from dsdistill.testing import check_synthesizer
from dsdistill.training import TrainingRecipe

SMALL = NetworkSpec(width=4, depth=2)
SIZES = {"ipc": 2, "iterations": 2, "real_batch": 4, "network": SMALL}
BASES = {
    "DM": DM(**SIZES, augmentation=None),
    "DM, tiles": DM(**SIZES, augmentation=None, form=Tiled()),
    "DM, batch norm": DM(**SIZES | {"network": replace(SMALL, norm="batch")}, augmentation=None),
    "DataDAM": DataDAM(**SIZES, augmentation=None),
    "DC": DC(**SIZES, outer_loop=2, inner_epochs=1),
    "DSA": DSA(**SIZES, outer_loop=2, inner_epochs=1, augmentation=None),
    "MTT": MTT(
        ipc=2,
        iterations=2,
        student_steps=3,
        max_start_epoch=2,
        lr_images=5.0,
        augmentation=None,
        network=SMALL,
        experts=Experts(count=2, training=PlainTraining(epochs=3, batch_size=12)),
    ),
    "NCFM": NCFM(**SIZES, augmentation=None, frequencies=16, networks=1, pretraining=TrainingRecipe(epochs=1)),
    "IDC": IDC(**SIZES, augmentation=None, inner_steps=2, trained_on=8),
}


def first_step(base, source, change=None):
    """Loss and gradient of the stored pixels of a wrapped step, the images changed before it."""
    method, run = FYI(base=base), run_of(source)
    method.prepare(run)
    state = begin(method, run)
    (pixels,) = state.images.parameters()
    if change is not None:
        pixels.data.copy_(change(pixels.data))
    return method.step(run, state, 0)["loss"], pixels.grad.clone()


def mirrored_in_part(pixels):
    """Every second stored image as its mirror image."""
    changed = pixels.clone()
    changed[::2] = pixels[::2].flip(3)
    return changed


@pytest.mark.parametrize("name", [name for name in BASES if "tiles" not in name])
def test_a_stored_image_may_be_replaced_by_its_mirror_image(name, source):
    base = replace(BASES[name], form=Plain())  # a mirrored sheet of tiles has its tiles in other places
    loss, gradient = first_step(base, source)
    other, moved = first_step(base, source, mirrored_in_part)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    expected = mirrored_in_part(gradient)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert float((moved - gradient).abs().max()) > 1e-2 * float(gradient.abs().max())


@pytest.mark.parametrize("name", ["DM", "DataDAM", "DC", "DSA", "MTT"])
def test_images_that_are_their_own_mirror_images_are_matched_as_the_base_does(name, source):
    base, run = BASES[name], run_of(source)

    def symmetric(pixels):
        return (pixels + pixels.flip(3)) / 2

    loss, _ = first_step(base, source, symmetric)
    state = begin(base, run)
    state.images.pixels.data.copy_(symmetric(state.images.pixels.data))
    torch.testing.assert_close(loss, base.step(run, state, 0)["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_any_base_keeps_the_contract_when_wrapped(name, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    assert len(check_synthesizer(FYI(base=BASES[name]))) == 9


@pytest.mark.parametrize("name", BASES)
def test_the_wrapper_changes_what_is_learned(name, source):
    plain, wrapped = (synthesize(method, source, progress=False) for method in (BASES[name], FYI(base=BASES[name])))
    assert plain.images.count == wrapped.images.count
    assert type(wrapped.images) is type(plain.images)
    assert not torch.equal(plain.tensors()[0], wrapped.tensors()[0])


def test_pairs_may_be_kept(source):
    kept, alone = (synthesize(FYI(base=BASES["DM"], store=store), source) for store in ("pairs", "images"))
    images, targets = kept.tensors()
    single, own = alone.tensors()
    assert torch.equal(images, torch.cat([single, single.flip(3)]))
    assert torch.equal(targets, torch.cat([own, own]))
    assert kept.nbytes.images == alone.nbytes.images


def test_where_flips_change_the_class_it_warns(source, caplog):
    with caplog.at_level(logging.WARNING, "dsdistill"):
        synthesize(FYI(base=BASES["DM"]), source)
    assert not caplog.records
    synthesize(FYI(base=BASES["DM"]), source.with_mirror_safe(False))
    assert "FYI+DM shows mirror images of 'toy'" in caplog.text


def test_what_makes_no_sense_is_refused(source):
    with pytest.raises(InvalidSetting, match="mirrored twice"):
        FYI(base=FYI(base=DM()))
    with pytest.raises(InvalidSetting, match="selects or draws"):
        FYI(base=RandomReal())
    with pytest.raises(InvalidSetting, match=r"Input should be an instance|instance of Synthesizer"):
        FYI(base="DM")
    with pytest.raises(InvalidSetting, match=r"FYI\.base.*FYI\+DM"):
        dd.create_method("FYI", store="pairs")
    with pytest.raises(UnknownName, match="setting of RandomReal"):
        dd.create_method("RandomReal+DM")
    with pytest.raises(InvalidSetting, match="needs 'maps'"):
        FYI(base=DataDAM(network=NetworkSpec("mlp"))).check(source)


def test_it_is_made_by_name_and_survives_json():
    made = dd.create_method("fyi+dm", ipc=3)
    assert made == FYI(base=DM(ipc=3))
    assert made.title == "FYI+DM"
    assert dd.create_method("FYI+DM", ipc=3, store="pairs") == replace(made, store="pairs")
    assert made.with_ipc(7) == FYI(base=DM(ipc=7))
    assert made.ipc == 3
    assert from_dict(FYI, json.loads(json.dumps(to_dict(made)))) == made
    assert dd.methods.is_method("FYI+DataDAM")
    assert not dd.methods.is_method("FYI+Nothing")


def test_the_command_line_wraps_and_continues(tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["--method.base.iterations", "2", "--method.base.real_batch", "4", "--method.base.network.width", "4"]
    command = ["synthesize", "--data", "digits", "--method", "FYI", "--method.base", "DM", "--method.base.ipc", "1"]
    assert main([*command, *settings, "--out", str(out)]) == 0
    assert "SyntheticDataset(FYI+DM" in capsys.readouterr().out
    recipe = dd.SyntheticDataset.load(out).recipe
    assert recipe.title == "FYI+DM"
    assert recipe.method["base"]["iterations"] == 2


def test_a_sweep_tells_wrapped_methods_apart(tmp_path):
    bases = [replace(BASES[name], iterations=1) for name in ("DM", "DataDAM")]
    tiny = dd.evaluation.EvaluationProtocol(epochs=1, network=NetworkSpec(width=4, depth=1))
    wrapped, folder = [FYI(base=base) for base in bases], tmp_path / "study"
    options = {"ipc": (1, 2), "seeds": 1, "repeats": 1, "protocol": tiny, "workers": 1}
    study = dd.studies.grid("digits", wrapped, out=folder, **options)
    assert {row["method"] for row in study.rows} == {"FYI+DM", "FYI+DataDAM"}
    assert {(point.method, point.ipc) for point in study.points} == {
        (name, ipc) for name in ("FYI+DM", "FYI+DataDAM") for ipc in (1, 2)
    }
