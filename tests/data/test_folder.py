import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from dsdistill.data import Normalization, load
from dsdistill.data.decode import Rule
from dsdistill.data.folder import Reading, load_folder
from dsdistill.errors import BadData, InvalidSetting


def fill(root, layout, size=(4, 3), mode="L"):
    """Write images: {"train/cat": [1, 2]} makes two images filled with 1 and 2."""
    for folder, shades in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index, shade in enumerate(shades):
            Image.new(mode, size, shade if mode == "L" else (shade, 0, 0)).save(root / folder / f"{index:03}.png")
    return root


def sized(height, width=None, **options):
    return Reading(Rule((height, width or height)), **options)


def shades(source):
    return [source.images[a:b, 0, 0, 0].tolist() for a, b in zip(source.offsets, source.offsets[1:], strict=False)]


def test_train_and_test(tmp_path):
    root = fill(tmp_path, {"train/dog": [3, 4], "train/cat": [1], "test/cat": [9], "test/dog": [8]})
    source = load_folder(root)
    assert source.name == tmp_path.name
    assert source.classes == ("cat", "dog")
    assert shades(source) == [[1], [3, 4]]
    assert source.shape == (1, 3, 4)
    assert source.normalization == Normalization.measure(source.images)
    assert shades(source.test) == [[9], [8]]
    assert source.test.normalization == source.normalization
    assert source.mirror_safe is True


def test_val_is_used_when_there_is_no_test_and_test_wins_otherwise(tmp_path, caplog):
    root = fill(tmp_path, {"train/a": [1], "val/a": [2]})
    assert shades(load_folder(root).test) == [[2]]
    fill(tmp_path, {"test/a": [3], "notes": []})
    with caplog.at_level(logging.INFO, "dsdistill"):
        assert shades(load_folder(root).test) == [[3]]
    assert "test split is test/; not used: 'notes/', 'val/'" in caplog.text


def test_class_folders_alone_are_split_by_seed(tmp_path):
    root = fill(tmp_path, {"a": range(10), "b": range(20, 25)})
    source = load_folder(root)
    assert (source.counts, source.test.counts) == ((8, 4), (2, 1))
    for train, test, expected in zip(shades(source), shades(source.test), (range(10), range(20, 25)), strict=True):
        assert sorted(train + test) == list(expected)
    assert load_folder(root).fingerprint == source.fingerprint
    assert load_folder(root, holdout_seed=1).fingerprint != source.fingerprint
    assert load_folder(root, holdout=0.5).counts == (5, 3)  # round(2.5) is 2


@pytest.mark.parametrize("storage_kind", ["memory", "cache"])
def test_one_class_of_one_image(tmp_path, monkeypatch, caplog, storage_kind):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    root = fill(tmp_path / "pets", {"train/cat": [1], "test/cat": [2]})
    with caplog.at_level(logging.INFO, "dsdistill"):
        _ = load_folder(root, Reading(storage=storage_kind)).test
    assert caplog.text.count("pets: one class only ('cat'): nothing to tell apart") == 1
    assert "pets: 1 class, 3 x 4 pixels, 1 channel" in caplog.messages
    assert f"{root}: decoding 1 image" in (message.partition(" into ")[0] for message in caplog.messages)


def test_train_alone_is_split_and_a_class_may_be_called_train(tmp_path):
    source = load_folder(fill(tmp_path / "one", {"train/a": [1, 2], "train/b": [3, 4]}))
    assert (source.classes, source.counts, source.test.counts) == (("a", "b"), (1, 1), (1, 1))
    vehicles = load_folder(fill(tmp_path / "two", {"bus": [1, 2], "train": [3, 4]}))
    assert vehicles.classes == ("bus", "train")


def test_a_broken_test_image_is_found_at_once_though_the_split_is_opened_later(tmp_path):
    root = fill(tmp_path, {"train/a": [1], "test/a": [2]})
    source = load_folder(root)
    (root / "test/a/000.png").write_bytes(b"broken")
    with pytest.raises(BadData, match=r"test/a/000.png: not a readable image"):
        load_folder(root)
    with pytest.raises(BadData, match=r"test/a/000.png: not a readable image"):
        _ = source.test


def test_the_test_split_takes_channels_and_size_from_the_train_split(tmp_path):
    root = fill(tmp_path, {"train/a": [1]}, mode="RGB")
    fill(root, {"test/a": [2]}, size=(9, 9))
    assert load_folder(root, sized(5, 6)).test.images.tolist() == [[[[2] * 6] * 5] * 3]
    with pytest.raises(BadData, match=r"a/000.png: 9 x 9 pixels where the training images have 3 x 4; .*image_size"):
        load_folder(root)
    grey = fill(tmp_path / "grey", {"train/a": [1]})
    fill(grey, {"test/a": [2]}, mode="RGB")
    with pytest.raises(BadData, match=r"000.png: a colour image"):
        _ = load_folder(grey).test


def test_hidden_and_foreign_files_are_ignored_and_sub_folders_are_searched(tmp_path):
    root = fill(tmp_path, {"train/a/deep/er": [5], "train/a/.hidden": [6], "train/.cache": [7], "test/a": [2]})
    (root / "train/a/notes.txt").write_text("no image")
    (root / "train/a/.000.png").write_bytes(b"")
    (root / "train/readme.md").write_text("no class")
    Image.new("L", (4, 3), 4).save(root / "train/a/upper.PNG")
    source = load_folder(root)
    assert source.classes == ("a",)
    assert shades(source) == [[5, 4]]


def test_names_with_spaces_emoji_and_broken_utf8(tmp_path):
    names = ["a cat", "\N{DOG FACE}", os.fsdecode(b"z\xff")]
    root = fill(tmp_path, {f"{split}/{name}": [1] for split in ("train", "test") for name in names})
    source = load_folder(root)
    assert source.classes == tuple(sorted(names))
    assert len(source.fingerprint) == 64
    assert source.test.classes == source.classes
    fill(root, {"train/" + os.fsdecode(b"y\xff"): []})
    with pytest.raises(BadData) as caught:
        load_folder(root)
    str(caught.value).encode()


def test_load_takes_paths_and_passes_everything_on(tmp_path, monkeypatch):
    root = fill(tmp_path / "pets", {"a": range(4), "b": range(10, 14)})
    monkeypatch.chdir(tmp_path)
    expected = load_folder(root, sized(2), holdout=0.5, holdout_seed=3)
    for path in (root, str(root), "./pets", "pets"):
        source = load(path, image_size=2, holdout=0.5, holdout_seed=3, mirror_safe=False)
        assert (source.fingerprint, source.test.fingerprint) == (expected.fingerprint, expected.test.fingerprint)
        assert (source.mirror_safe, source.test.mirror_safe) == (False, False)
        assert source.shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train/a": [1], "train/b": [], "test/a": [1], "test/b": [1]}, "no images in '.*train/b'; add images"),
        ({"train/a": [1], "train/b": [2], "test/a": [1], "test/b": []}, "no images in '.*test/b'; add images"),
        ({"train/a": [1], "train/b": [2], "test/a": [1]}, "the test split lacks 'b'; both need the same classes"),
        ({"train/a": [1], "test/a": [1], "test/c": [1]}, "the test split has 'c', which the train split lacks"),
        ({"train": [1], "test/a": [1]}, "train: no class folders; put the images of each class"),
        ({"train/a": [1], "test": [1]}, "test: no class folders"),
        ({".": [1]}, "no class folders; put the images of each class into a folder"),
        ({".": []}, "no class folders"),
        ({"a": [1, 2], "b": [3]}, "one image cannot be split in two parts; add images to the classes 'b'"),
    ],
)
def test_unsuitable_folders_are_refused_before_decoding(tmp_path, monkeypatch, layout, message):
    monkeypatch.setattr("dsdistill.data.folder.read_files", None)
    with pytest.raises(BadData, match=message):
        load_folder(fill(tmp_path, layout))


def test_a_path_that_is_no_folder(tmp_path):
    with pytest.raises(BadData, match="gone: no such folder; check the path"):
        load_folder(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadData, match="file: is a file; give the folder that holds"):
        load_folder(tmp_path / "file")


@pytest.mark.parametrize("place", [".", "a"])
def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, place):
    root = fill(tmp_path, {"a": [1, 2]})
    closed = os.fspath(root / place)
    scandir, listdir = os.scandir, os.listdir

    def refuse(function):
        def call(path="."):
            if os.fspath(path) == closed:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path)

        return call

    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "listdir", refuse(listdir))
    with pytest.raises(BadData, match=rf"{root.name}.*: cannot be read \(Permission denied\); check its permissions"):
        load_folder(root)


def test_mixed_sizes_name_the_mend_and_a_corrupt_file_is_named(tmp_path):
    root = fill(tmp_path, {"train/a": [1], "test/a": [1]})
    fill(root, {"train/b": [1], "test/b": [1]}, size=(5, 5))
    with pytest.raises(BadData, match=r"mixed sizes, height x width: 3x4 \(1\), 5x5 \(1\); pass image_size="):
        load_folder(root)
    assert load_folder(root, sized(4)).shape == (1, 4, 4)
    (root / "train/b/001.jpg").write_bytes(b"text")
    with pytest.raises(BadData, match=r"001.jpg: not a readable image"):
        load_folder(root, sized(4))


def test_settings_are_checked_first(tmp_path):
    for holdout in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidSetting, match=r"holdout = .* above 0 and below 1"):
            load_folder(tmp_path, holdout=holdout)
    for option, value in (("image_size", 0), ("resize", "bend"), ("storage", "cloud"), ("on_bad_image", "hide")):
        with pytest.raises(InvalidSetting, match=f"{option} = "):
            load(tmp_path, **{option: value})
    with pytest.raises(InvalidSetting, match=r"max_skipped = 1\.5"):
        load(tmp_path, max_skipped=1.5)


def test_pixels_arrive_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "x.png")
    assert torch.equal(load_folder(tmp_path).images[0], torch.from_numpy(pixels).permute(2, 0, 1))
