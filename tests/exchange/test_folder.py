import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from dsdistill import SyntheticDataset, data
from dsdistill.data import Normalization
from dsdistill.errors import DistillError, InvalidSetting, OutputConflict
from dsdistill.exchange import folder as folder_module
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.parameterizations import Pixels
from dsdistill.recipe import Recipe

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is tested here


def make(classes=("a", "b"), ipc=2, shape=(3, 4, 6), unit=None, mean=MEAN, std=STD):
    """A set of the given pixels in units of [0, 1]; random ones within and beyond the range if None."""
    count, channels = len(classes) * ipc, shape[0]
    if unit is None:
        unit = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5 - 0.25
    statistics = Normalization(mean[:channels], std[:channels])
    m, s = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
    labels = HardLabels(torch.arange(len(classes)).repeat_interleave(ipc), len(classes))
    recipe = Recipe(method={}, seed=0, source={"name": "toy"})
    return SyntheticDataset(Pixels(((unit - m) / s).float()), labels, statistics, tuple(classes), recipe)


def unit_of(made):
    mean, std = np.array(made.normalization.mean), np.array(made.normalization.std)
    return made.tensors()[0].double().numpy() * std[:, None, None] + mean[:, None, None]


def pngs(folder):
    """Folder name and (H, W, C) bytes of every file, in order of the file names."""
    found = {}
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            found[path.name] = path.parent.name, np.asarray(image)
    return [found[name] for name in sorted(found)]


# An image folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 10, 6)])
def test_pixels_are_clipped_and_rounded_to_8_bits_and_the_loss_is_told(shape, tmp_path):
    made = make(shape=shape)
    unit = unit_of(made)
    report = made.export(tmp_path / "out")
    assert (report.path, report.images) == (tmp_path / "out", 4)
    written = pngs(tmp_path / "out")
    assert [name for name, _ in written] == ["a", "a", "b", "b"]
    stored = np.stack([array if array.ndim == 3 else array[:, :, None] for _, array in written]).transpose(0, 3, 1, 2)
    assert stored.dtype == np.uint8
    assert (stored == np.rint(unit.clip(0, 1) * 255)).all()
    assert np.abs(stored / 255 - unit.clip(0, 1)).max() <= 0.5 / 255 + 1e-9
    outside = (unit < 0) | (unit > 1)
    assert 0.2 < outside.mean() < 0.5
    assert report.clipped == pytest.approx(outside.mean(), abs=1e-7)
    assert report.rounding == pytest.approx(
        np.abs(np.rint(unit.clip(0, 1) * 255) / 255 - unit.clip(0, 1)).max(), abs=1e-6
    )


def test_one_pixel_clipped_and_one_rounded_by_a_known_amount(tmp_path):
    unit = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    unit[0, 0, 0] = torch.tensor([1.5, (100 + 0.375) / 255])
    report = make(ipc=1, unit=unit, shape=(1, 2, 2), mean=(0.5,), std=(0.5,)).export(tmp_path / "out")
    assert report.clipped == 1 / 8
    assert report.rounding == pytest.approx(0.375 / 255, abs=1e-7)


@pytest.mark.parametrize(("mean", "std"), [(0.1307, 0.3081), (0.1989, 0.1649), (0.4377, 0.1980)])
def test_8_bit_images_lose_nothing(mean, std, tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).repeat(2, 1).view(2, 1, 16, 16)
    statistics = Normalization((mean,), (std,))
    labels = HardLabels(torch.arange(2), 2)
    recipe = Recipe(method={}, seed=0, source={})
    made = SyntheticDataset(Pixels(statistics.standardize(levels)), labels, statistics, ("a", "b"), recipe)
    report = made.export(tmp_path / "out")
    assert all((array == levels[0, 0].numpy()).all() for _, array in pngs(tmp_path / "out"))
    assert report.clipped == 0
    assert report.rounding < 1e-6


@pytest.mark.parametrize(
    "names",
    [
        ("a/b", "a\\b", "a_b"),
        ("Cat", "cat", "CAT"),
        ("..", ".", "..."),
        ("", " ", "%20"),
        ("/etc/passwd", "../../x", "~"),
        ("owl", "owl.", " owl", ".owl"),
        ("\U0001f408", "\u732b", "caf\u00e9"),
        ("\udcff", "\udcfe", "plain"),
        ("a\x00b", "a\nb", "a:b*?"),
        ("%2e", "\u00e9", "e\u0301"),
    ],
    ids=ascii,
)
def test_hostile_class_names_stay_inside_and_apart(names, tmp_path):
    out = tmp_path / "inner" / "out"
    make(names).export(out)
    folders = sorted(path for path in out.iterdir())
    assert all(path.is_dir() and not path.is_symlink() for path in folders)
    assert len({path.name.lower() for path in folders}) == len(folders) == len(names)
    assert not any(path.name.startswith(".") or path.name != path.name.strip(" .") for path in folders)
    assert sum(len(list(path.glob("*.png"))) for path in folders) == 2 * len(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner"]
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["out"]
    assert [name for name, _ in pngs(out)][::2] == [name for name, _ in pngs(out)][1::2]


def test_readable_names_are_kept_as_they_are(tmp_path):
    names = ("A-1_b (x)", "great grey owl", "it's", "ünï 🐕")
    make(names).export(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)


@pytest.mark.parametrize("name", ["x" * 300, "\u732b" * 60], ids=["long", "long when quoted"])
def test_very_long_class_names_are_shortened_or_refused_in_words(name, tmp_path):
    try:
        make((name, name + "y")).export(tmp_path / "out")
    except DistillError:
        assert not (tmp_path / "out").exists()
    else:
        assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("format", ["folder", "npz"])
def test_an_existing_target_is_left_alone(format, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for target in ("file", "folder"):
        with pytest.raises(OutputConflict, match="exists already"):
            make().export(tmp_path / target, format)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())
    with pytest.raises(OutputConflict):
        make().export(tmp_path / "file" / "below", format)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InvalidSetting, match=r"format = 'hdf5' .*folder, npz"):
        make().export(tmp_path / "out", "hdf5")
    assert not list(tmp_path.iterdir())


def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    encode, calls = folder_module.encode_png, []

    def fail_at_third(image):
        calls.append(image)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(folder_module, "encode_png", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        make().export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_npz_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="bytes are needed"):
        make().export(tmp_path / "out.npz", "npz")
    assert not list(tmp_path.iterdir())


def test_torchvision_reads_the_folder(tmp_path):
    made = make(("auk", "bee", "cow"))
    made.export(tmp_path / "out")
    folder = ImageFolder(tmp_path / "out", ToTensor())
    assert tuple(folder.classes) == made.classes  # names given in sorted order keep their labels
    assert folder.targets == made.targets
    images = made.normalization.to_unit(made.tensors()[0]).clamp(0, 1)
    for (image, _), expected in zip(folder, images, strict=True):
        assert (image - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("cow", "auk", "bee"), ["0 cow", "1 auk", "2 bee"]),
        (("cow", "Cow", "auk"), ["0 cow", "1 Cow", "2 auk"]),
        (("a/b", "a:b", "c"), ["a%2Fb", "a%3Ab", "c"]),
    ],
)
def test_readers_that_number_classes_by_name_find_the_labels_of_the_set(names, folders, tmp_path):
    made = make(names)
    made.export(tmp_path / "out")
    folder = ImageFolder(tmp_path / "out", ToTensor())
    assert folder.classes == folders
    assert folder.targets == made.targets
    images = made.normalization.to_unit(made.tensors()[0]).clamp(0, 1)
    for (image, _), expected in zip(folder, images, strict=True):
        assert (image - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 10, 6)])
def test_our_own_loader_reads_the_folder(shape, tmp_path):
    made = make(("auk", "bee"), ipc=4, shape=shape)
    made.export(tmp_path / "out")
    source = data.load(tmp_path / "out", holdout=0.25)
    assert (source.classes, source.shape, source.counts, source.test.counts) == (made.classes, shape, (3, 3), (1, 1))
    expected = made.normalization.to_uint8(made.tensors()[0])
    read = torch.cat([source.images, source.test.images])
    for image in expected:
        assert int((read == image).flatten(1).all(1).sum()) == 1


def test_each_image_lies_under_the_class_it_was_made_for_whatever_label_it_learned(tmp_path, caplog):
    made = make()
    swayed = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [0.0, 5.0]])  # the second and the third went over
    made = replace(made, labels=SoftLabels(swayed, made.labels.classes))
    made.export(tmp_path / "out")
    assert [name for name, _ in pngs(tmp_path / "out")] == ["a", "a", "b", "b"]
    assert "each image lies under the class it was made for" in caplog.text


def test_a_folder_says_which_learned_tensors_it_loses(tmp_path, caplog):
    learned = {"lr": torch.tensor(0.018543), "table": torch.zeros(2, 3)}
    replace(make(), learned=learned).export(tmp_path / "out")
    assert (
        "out: this format has no place for the learned lr = 0.01854, table of shape (2, 3); the set keeps"
        in caplog.text
    )
    caplog.clear()
    make().export(tmp_path / "plain")
    assert not caplog.records


# npz ---------------------------------------------------------------------------------------------------------


def test_npz_is_lossless_and_holds_no_pickle(tmp_path):
    made = make(("auk", "\u732b", "a much longer name"))
    report = made.export(tmp_path / "below" / "out.npz", "npz")
    assert report == (tmp_path / "below" / "out.npz", 6, 0.0, 0.0)
    with np.load(tmp_path / "below" / "out.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"images", "targets", "mean", "std", "classes"}
        assert arrays["images"].dtype == np.float32
        assert (arrays["images"] == made.tensors()[0].numpy()).all()
        assert arrays["targets"].tolist() == made.targets
        assert arrays["classes"].tolist() == list(made.classes)
        assert tuple(arrays["mean"]) == MEAN
        assert tuple(arrays["std"]) == STD


def test_npz_keeps_names_that_are_not_utf8(tmp_path):
    make(("\udcff", "b")).export(tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["classes"].tolist() == ["\udcff", "b"]


@pytest.mark.parametrize("format", ["folder", "npz"])
def test_equal_sets_export_equal_bytes(format, tmp_path):
    def contents(path: Path):
        return {file.relative_to(path): file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}

    for name in ("one", "two"):
        make().export(tmp_path / name, format)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
