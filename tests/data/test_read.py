import logging

import numpy as np
import pytest
from PIL import Image

from dsdistill.data import read
from dsdistill.data.decode import Rule
from dsdistill.data.read import BadImages, read_files
from dsdistill.errors import BadData, InvalidSetting


def test_only_a_few_images_wait_at_any_time(monkeypatch):
    monkeypatch.setattr(read.os, "cpu_count", lambda: 2)
    begun = []

    def items():
        for number in range(100):
            begun.append(number)
            yield number

    for taken, result in enumerate(read._in_threads(lambda number: number, items())):
        assert result == taken
        assert len(begun) <= taken + 8
    assert len(begun) == 100


def test_work_that_is_no_longer_needed_is_not_begun(monkeypatch):
    monkeypatch.setattr(read.os, "cpu_count", lambda: 1)
    results = read._in_threads(lambda number: number, iter(range(10**9)))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()


def write(folder, content):
    """Grey images, or broken files where the shade is None."""
    paths = []
    for index, shade in enumerate(content):
        paths.append(folder / f"{index}.png")
        if shade is None:
            paths[-1].write_bytes(b"broken")
        else:
            Image.new("L", (2, 1), shade).save(paths[-1])
    return paths


def test_places_tell_where_the_images_come_from(tmp_path):
    paths = write(tmp_path, [None, 5, 6, None, 7])
    images, places, skipped = read_files("set", paths, Rule(), None, BadImages("skip", 0.5))
    assert images.tolist() == [[[[5, 5]]], [[[6, 6]]], [[[7, 7]]]]
    assert places == (1, 2, 4)
    assert [(path, why.partition(";")[0]) for path, why in skipped] == [
        (paths[index], "not a readable image (cannot identify image file)") for index in (0, 3)
    ]


def test_the_first_bad_file_ends_it_unless_they_are_skipped(tmp_path):
    paths = write(tmp_path, [1, None, None])
    with pytest.raises(BadData, match=r"1.png: not a readable image"):
        read_files("set", paths)


def test_many_bad_files_are_counted_and_the_first_named(tmp_path):
    paths = write(tmp_path, [None] * 5 + [1])
    with pytest.raises(BadData) as caught:
        read_files("set", paths, bad_images=BadImages("skip", 0.5))
    text = str(caught.value)
    assert text.startswith(f"set: 5 of 6 images are bad, more than max_skipped=0.5 of them: {paths[0]}: not a readable")
    assert text.endswith("; and 2 more")
    assert "2.png" in text
    assert "3.png" not in text


@pytest.mark.parametrize(
    ("count", "rest"), [(2, ""), (10, ""), (12, "; and 2 more (source.skipped of Python lists all)")]
)
def test_files_left_out_are_named(tmp_path, caplog, count, rest):
    paths = write(tmp_path, [None] * count + [1])
    with caplog.at_level(logging.WARNING, "dsdistill"):
        read_files("set", paths, bad_images=BadImages("skip", 1))
    (text,) = (record.message for record in caplog.records)
    assert text.startswith(f"set: {count} of {count + 1} images are bad and left out: {paths[0]}: not a readable image")
    assert [str(path) in text for path in paths] == [index < min(count, 10) for index in range(count + 1)]
    assert text.endswith(f"; replace or remove the file{rest}")


def test_settings_are_checked():
    with pytest.raises(InvalidSetting, match="on_bad_image = 'hide'"):
        BadImages("hide")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidSetting, match=r"max_skipped = .* 0 to 1"):
            BadImages("skip", share)
    with pytest.raises(InvalidSetting, match=r"resize = .bend. .* stretch, crop, pad"):
        Rule((2, 2), "bend")


def test_channels_other_than_grey_and_colour(tmp_path):
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", np.full((1, 2, 2), index, np.uint8))
    paths = sorted(tmp_path.glob("*.npy"))
    assert read_files("set", paths)[0].tolist() == [[[[0, 0]], [[0, 0]]], [[[1, 1]], [[1, 1]]]]
