"""Sets as papers publish them: what each line of work leaves on disk, and what hostile files look like."""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from dsdistill import SyntheticDataset, import_published
from dsdistill.data import Normalization
from dsdistill.errors import BadArtifact, BadData, InvalidSetting

NAMES = ("heron", "egret", "owl")
STATISTICS = Normalization((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def read(path, **options):
    return import_published(path, **{"normalization": STATISTICS, "classes": NAMES, **options})


def saved(folder, content, name="set.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


SHAPES = {
    "tensor": IMAGES,
    "pair": [IMAGES, LABELS],
    "tuple": (IMAGES, LABELS),
    "images one by one": list(IMAGES),
    "named": {"images": IMAGES, "labels": LABELS},
    "named otherwise": OrderedDict(image_syn=IMAGES, label_syn=LABELS),
    "a parameter": torch.nn.Parameter(IMAGES),
    "several sets": [[IMAGES * 0, LABELS], [IMAGES, LABELS]],
    "three": (IMAGES, LABELS, torch.tensor(0.1)),
    "one set in a list": [[IMAGES, LABELS]],
    "DC, DSA, DM": {
        "data": [[IMAGES * 0, LABELS], [IMAGES, LABELS]],
        "accs_all_exps": {"ConvNet": [np.float64(0.5), np.float32(0.25), 1.5], "MLP": []},
    },
    "with numpy arrays beside": {"data": [[IMAGES, LABELS]] * 2, "scores": np.arange(3.0)},
}


SEVERAL = ("several sets", "DC, DSA, DM", "with numpy arrays beside")


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_form_gives_the_same_set(form, zipped, tmp_path):
    path = saved(tmp_path, SHAPES[form], _use_new_zipfile_serialization=zipped)
    made = read(path, **({"which": 1} if form in SEVERAL else {}))
    assert (("lr" in made.learned), len(made.learned)) == ((True, 1) if form == "three" else (False, 0))
    assert torch.equal(made.tensors()[0], IMAGES)
    assert made.targets == LABELS.tolist()
    assert made.normalization == STATISTICS
    assert made.recipe.method["file"] == "set.pt"
    assert "importer stated" in made.recipe.notes[0]
    again = SyntheticDataset.load(made.save(tmp_path / "saved"))
    assert torch.equal(again.tensors()[0], IMAGES)


@pytest.mark.parametrize("names", [("images.pt", "labels.pt", "lr.pt"), ("images_best.pt", "labels_best.pt", "lr.pt")])
def test_a_folder_of_loose_tensors(names, tmp_path):
    for name, content in zip(names, (IMAGES, LABELS.flip(0), torch.tensor(0.03)), strict=True):
        saved(tmp_path, content, name)
    made = read(tmp_path)
    assert made.targets == [2, 2, 1, 1, 0, 0]
    assert made.learned["lr"].item() == pytest.approx(0.03)
    assert made.nbytes.learned == 4
    out = made.export(tmp_path / "out", "pt").path
    assert sorted(path.name for path in out.iterdir()) == ["images.pt", "labels.pt", "lr.pt"]
    assert torch.equal(torch.load(out / "images.pt", weights_only=True), IMAGES)
    assert read(out).targets == made.targets


def test_pixels_in_0_to_1_are_standardised_and_tiles_are_cut(tmp_path):
    unit = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    path = saved(tmp_path, [unit, LABELS])
    made = read(path, pixels="unit", factor=2)
    torch.testing.assert_close(STATISTICS.to_unit(made.images.pixels.detach()), unit, rtol=0, atol=1e-6)
    assert (len(made), made.ipc, made.images.key) == (24, 2, "tiles")
    assert read(path, pixels="unit").images.key == "pixels"


def test_pixels_that_look_unstandardised_are_pointed_out(tmp_path, caplog):
    read(saved(tmp_path, [IMAGES, LABELS]))
    assert not caplog.records
    read(saved(tmp_path, [IMAGES.sigmoid(), LABELS]))
    assert "all pixels lie in 0..1" in caplog.text


def test_labels_from_a_file_of_their_own(tmp_path):
    images, labels = saved(tmp_path, IMAGES), saved(tmp_path, LABELS.flip(0).float(), "y.pt")
    assert read(images, labels=labels).targets == [2, 2, 1, 1, 0, 0]


def test_logits_become_probabilities_and_probabilities_stay(tmp_path):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 3
    for targets in (logits, logits.softmax(1)):
        made = read(saved(tmp_path, [IMAGES, targets]))
        torch.testing.assert_close(made.tensors()[1], logits.softmax(1), rtol=1e-5, atol=1e-6)
        assert made.labels.key == "soft"
        assert made.targets == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        (IMAGES[:5], {}, BadData, "5 images without labels, and 3 classes do not divide it"),
        (IMAGES[0], {}, BadData, r"\(3, 4, 4\)"),
        (IMAGES.to(torch.uint8), {}, BadData, "uint8; expected"),
        (IMAGES * torch.nan, {}, BadData, "NaN"),
        ([IMAGES, LABELS[:4]], {}, BadData, r"labels are \(4,\)"),
        ([IMAGES, LABELS + 1], {}, BadData, r"\[1, 3\], but there are 3 classes"),
        ([IMAGES, LABELS + 0.5], {}, BadData, "labels are"),
        ({"weights": IMAGES}, {}, BadData, "no images under any of images, .* it holds 'weights'"),
        ([[IMAGES, LABELS]], {"which": 1}, InvalidSetting, "holds 1 sets, 0 to 0"),
        ([[IMAGES, LABELS]] * 3, {}, InvalidSetting, "holds 3 sets, 0 to 2: say which"),
        ({"images": IMAGES, "marks": LABELS}, {}, BadData, "no labels under any of .* 'marks'.*name their file"),
        ((IMAGES, LABELS, IMAGES), {}, BadData, "holds tuple"),
        (IMAGES, {"pixels": "bytes"}, InvalidSetting, "standardised, unit"),
        ("text", {}, BadData, "holds str"),
        ([], {}, BadData, "holds list"),
    ],
)
def test_what_does_not_fit_is_refused(content, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read(saved(tmp_path, content), **options)


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: [IMAGES, evil], lambda evil: {"data": [[IMAGES, evil]]}]
)
@pytest.mark.parametrize("writer", ["zip", "legacy", "plain pickle"])
def test_hostile_files_execute_nothing(wrap, writer, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "set.pt"
    content = wrap(Evil(canary))
    if writer == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(BadArtifact, match=r"set\.pt"):
        read(path)
    assert not canary.exists()
    assert BadArtifact.exit_code == 6


def test_numpy_is_never_run_on_what_a_file_says(tmp_path, monkeypatch):
    path = saved(tmp_path, {"data": [[IMAGES, LABELS]], "score": np.float64(1), "array": np.arange(2)})

    def never(*_):
        raise AssertionError("numpy rebuilt something")

    monkeypatch.setattr(np._core.multiarray, "scalar", never)
    monkeypatch.setattr(np._core.multiarray, "_reconstruct", never)
    assert read(path).targets == LABELS.tolist()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "flipped head"])
def test_damaged_files_are_named(damage, tmp_path):
    path = saved(tmp_path, [IMAGES, LABELS])
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello", "flipped head": b"\0" + data[1:]}[
                damage
            ]
        )
    with pytest.raises(BadArtifact, match=r"set\.pt"):
        read(path)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(BadArtifact, match=r"no images\.pt or images_best\.pt"):
        read(tmp_path)


def test_the_statement_of_the_normalisation_cannot_be_left_out():
    with pytest.raises(TypeError, match="normalization"):
        import_published(io.BytesIO(), classes=NAMES)


def test_a_normalisation_may_be_named(tmp_path):
    made = read(saved(tmp_path, [IMAGES, LABELS]), normalization="cifar10")
    assert made.normalization.mean == (0.4914, 0.4822, 0.4465)


def test_pixels_beyond_0_to_1_were_standardised(tmp_path):
    with pytest.raises(BadData, match=r"pixels reach from -.* not 0 to 1"):
        read(saved(tmp_path, [IMAGES, LABELS]), pixels="unit")
