import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dsdistill.data.decode import checked_size, read_file, read_files, shown, to_pixels
from dsdistill.errors import BadData, InvalidSetting


def stored(path, image, **options):
    image.save(path, **options)
    return path


def grey(*rows):
    return Image.fromarray(np.array(rows, np.uint8))


def colour(*rows):
    return Image.fromarray(np.array(rows, np.uint8))


# Golden pixels -------------------------------------------------------------------------------------------


def test_grey_and_bilevel(tmp_path):
    assert read_file(stored(tmp_path / "g.png", grey([0, 7, 255]))).tolist() == [[0, 7, 255]]
    bilevel = read_file(stored(tmp_path / "b.png", grey([0, 255]).convert("1")))
    assert (bilevel.tolist(), bilevel.dtype) == ([[0, 255]], np.uint8)


def test_rgb_of_every_lossless_format(tmp_path):
    rows = [[[1, 2, 3], [255, 0, 128]]]
    for name in ("a.png", "a.bmp", "a.tif", "a.tiff", "a.ppm"):
        assert read_file(stored(tmp_path / name, colour(*rows))).tolist() == rows
    assert read_file(stored(tmp_path / "a.webp", colour(*rows), lossless=True)).tolist() == rows


def test_jpeg_is_close(tmp_path):
    pixels = read_file(stored(tmp_path / "a.JPG", colour(*[[[200, 40, 90]] * 16] * 16), quality=95))
    assert np.abs(pixels.astype(int) - [200, 40, 90]).max() <= 3


def test_palette_becomes_rgb_and_its_transparency_black(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 200, 210, 220])
    assert image.mode == "P"
    assert read_file(stored(tmp_path / "p.png", image)).tolist() == [[[10, 20, 30], [40, 50, 60], [200, 210, 220]]]
    clear = stored(tmp_path / "t.png", image, transparency=2)
    assert read_file(clear).tolist() == [[[10, 20, 30], [40, 50, 60], [0, 0, 0]]]


def test_alpha_is_composited_on_black(tmp_path):
    rgba = colour([[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 51, 128]])
    expected = [[[200, 100, 50], [0, 0, 0], [100, 50, 26]]]  # 100.39, 50.2, 25.6
    assert read_file(stored(tmp_path / "a.png", rgba)).tolist() == expected
    la = Image.fromarray(np.array([[[200, 255], [200, 0], [51, 128]]], np.uint8), mode="LA")
    assert read_file(stored(tmp_path / "la.png", la)).tolist() == [[200, 0, 26]]
    key = stored(tmp_path / "key.png", grey([0, 128, 255]), transparency=255)
    assert read_file(key).tolist() == [[0, 128, 0]]
    rgb_key = stored(tmp_path / "rgbkey.png", colour([[9, 8, 7], [1, 2, 3]]), transparency=(9, 8, 7))
    assert read_file(rgb_key).tolist() == [[[0, 0, 0], [1, 2, 3]]]
    bilevel = stored(tmp_path / "bikey.png", grey([0, 255]).convert("1"), transparency=1)
    assert read_file(bilevel).tolist() == [[0, 0]]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    expected = [[0, 0, 1, 1, 128, 254, 255, 255]]
    image = Image.fromarray(values)
    for name in ("a.png", "a.tif"):
        assert read_file(stored(tmp_path / name, image)).tolist() == expected
    (tmp_path / "a.ppm").write_bytes(b"P5 8 1 65535\n" + values.astype(">u2").tobytes())
    assert read_file(tmp_path / "a.ppm").tolist() == expected
    big = struct.pack(">2sHIH", b"MM", 42, 8, 8)
    tags = [(256, 3, 1, 8 << 16), (257, 3, 1, 1 << 16), (258, 3, 1, 16 << 16), (259, 3, 1, 1 << 16),
            (262, 3, 1, 1 << 16), (273, 4, 1, 110), (277, 3, 1, 1 << 16), (279, 4, 1, 16)]  # fmt: skip
    big += b"".join(struct.pack(">HHII", *tag) for tag in tags) + b"\0" * 4
    big = big[:8] + big[8:].ljust(102, b"\0") + values.astype(">u2").tobytes()
    (tmp_path / "big.tif").write_bytes(big)
    with Image.open(tmp_path / "big.tif") as opened:
        assert opened.mode == "I;16B"
    assert read_file(tmp_path / "big.tif").tolist() == expected


def test_cmyk_and_animation(tmp_path):
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0]]], np.uint8), mode="CMYK")
    assert read_file(stored(tmp_path / "c.tif", cmyk)).tolist() == [[[255, 255, 255], [0, 255, 255]]]
    frames = [Image.new("RGB", (2, 1), shade) for shade in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_file(tmp_path / "a.gif").tolist() == [[[255, 0, 0], [255, 0, 0]]]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    path = stored(tmp_path / "turned.png", grey([1, 2, 3], [4, 5, 6]), exif=exif)
    assert read_file(path).tolist() == [[4, 1], [5, 2], [6, 3]]


def test_the_callers_image_is_left_alone():
    image = grey([1, 2], [3, 4])
    image.getexif()[0x0112] = 6
    to_pixels(image)
    assert (image.size, image.getexif()[0x0112], np.asarray(image).tolist()) == ((2, 2), 6, [[1, 2], [3, 4]])


def test_resizing_stretches_the_whole_frame_with_antialiasing(tmp_path):
    stripes = np.zeros((8, 64), np.uint8)
    stripes[:, ::2] = 255
    path = stored(tmp_path / "s.png", Image.fromarray(stripes))
    small = read_file(path, (4, 8))
    assert small.shape == (4, 8)
    assert np.abs(small.astype(int) - 127).max() <= 12  # plain sampling would give 0 or 255
    assert np.array_equal(small, np.asarray(Image.fromarray(stripes).resize((8, 4), Image.Resampling.BICUBIC)))
    halves = np.repeat([[0] * 8 + [255] * 8], 4, axis=0).astype(np.uint8)
    turned = read_file(stored(tmp_path / "h.png", Image.fromarray(halves)), (6, 4))
    assert turned[:, [0, 3]].tolist() == [[0, 255]] * 6
    assert read_file(path, (8, 64)).tolist() == stripes.tolist()


def test_odd_sizes(tmp_path):
    assert read_file(stored(tmp_path / "one.png", grey([9]))).tolist() == [[9]]
    assert read_file(stored(tmp_path / "long.png", Image.new("L", (20000, 1), 5)), (2, 2)).tolist() == [[5, 5]] * 2


# Sets ----------------------------------------------------------------------------------------------------


def test_a_set_is_grey_only_when_every_image_is(tmp_path):
    first = stored(tmp_path / "g.png", grey([1, 2]))
    second = stored(tmp_path / "c.png", colour([[3, 4, 5], [6, 7, 8]]))
    assert read_files("set", [first]).tolist() == [[[[1, 2]]]]
    both = read_files("set", [first, second])
    assert both.dtype == torch.uint8
    assert both.tolist() == [[[[1, 2]]] * 3, [[[3, 6]], [[4, 7]], [[5, 8]]]]
    assert read_files("set", [first], channels=3).shape == (1, 3, 1, 2)
    with pytest.raises(BadData, match=r"c.png: a colour image .* grey; convert it"):
        read_files("set", [first, second], channels=1)


def test_order_is_that_of_the_paths(tmp_path):
    paths = [stored(tmp_path / f"{value}.png", grey([value])) for value in range(60)]
    assert read_files("set", paths[::-1]).flatten().tolist() == list(range(60))[::-1]


def test_mixed_sizes_are_listed_with_the_mend(tmp_path):
    paths = [stored(tmp_path / f"{i}.png", Image.new("L", (i, 2))) for i in (3, 4, 5, 6, 7, 8, 9)]
    paths.append(stored(tmp_path / "again.png", Image.new("L", (9, 2))))
    with pytest.raises(BadData) as caught:
        read_files("set", paths)
    assert str(caught.value) == (
        "set: images have mixed sizes, height x width: 2x9 (2), 2x3 (1), 2x4 (1), 2x5 (1), 2x6 (1) and 2 other "
        "sizes; pass image_size= to resize them all"
    )
    assert read_files("set", paths, (2, 2)).shape == (8, 1, 2, 2)


def test_images_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    def refuse(*_):
        raise MemoryError

    path = stored(tmp_path / "a.png", grey([1]))
    monkeypatch.setattr("dsdistill.data.decode.np.empty", refuse)
    with pytest.raises(BadData, match="set: the images need 0 GB of memory; pass a smaller image_size="):
        read_files("set", [path])


# Bad files -----------------------------------------------------------------------------------------------


def png_bytes(**options):
    file = io.BytesIO()
    Image.effect_noise((32, 32), 80).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"just text", png_bytes()[:200], png_bytes()[:-200] + b"\0" * 200, b"\x89PNG\r\n\x1a\n" + b"\xff" * 40],
    ids=["empty", "text", "truncated", "corrupt", "garbage"],
)
def test_a_bad_file_is_named(tmp_path, content):
    good = stored(tmp_path / "good.png", Image.new("L", (32, 32)))
    bad = tmp_path / "bad file.png"
    bad.write_bytes(content)
    with pytest.raises(BadData, match=r"bad file.png: not a readable image .*; replace or remove the file"):
        read_files("set", [good, bad, good])


def test_only_the_listed_formats_are_decoded(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (2, 2)).save(path, format="TGA")
    with pytest.raises(BadData, match="not a readable image"):
        read_file(path)


def test_a_truncated_jpeg_is_refused(tmp_path):
    path = stored(tmp_path / "a.jpg", Image.effect_noise((64, 64), 80))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadData, match=r"a.jpg: not a readable image .*truncated"):
        read_file(path)


@pytest.mark.parametrize("strict", [False, True])
def test_a_decompression_bomb_is_refused(tmp_path, strict):
    side = 12_000  # 144 million pixels in a file of a few hundred bytes

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore", Image.DecompressionBombWarning)
        with pytest.raises(BadData, match=r"bomb.png: larger than 89478485 pixels .* shrink it"):
            read_file(path)


def test_missing_and_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(BadData, match=r"gone.png: cannot be read \(No such file"):
        read_file(tmp_path / "gone.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BadData, match=r"a.png: cannot be read \(Permission denied\); check .* permissions"):
        read_file(tmp_path / "a.png")


def test_pixels_without_an_agreed_range_are_refused(tmp_path):
    floats = stored(tmp_path / "f.tif", Image.fromarray(np.ones((1, 1), np.float32)))
    with pytest.raises(BadData, match=r"f.tif: .*float pixels have no agreed range"):
        read_file(floats)
    wide = stored(tmp_path / "i.tif", Image.fromarray(np.full((1, 1), 70000, np.int32)))
    with pytest.raises(BadData, match=r"i.tif: .*beyond 16 bits"):
        read_file(wide)


def test_image_size():
    assert checked_size(None) is None
    assert checked_size(32) == (32, 32)
    assert checked_size((8, 16)) == checked_size([8, 16]) == (8, 16)
    for value in (0, -1, True, 2.5, (8,), (8, 0), "32", (8, 8, 8), (8, True)):
        with pytest.raises(InvalidSetting, match=r"image_size = .* one int"):
            checked_size(value)


def test_messages_about_names_that_are_not_utf8_can_be_printed(tmp_path):
    assert shown(tmp_path / "a\udcff \N{DOG FACE}").endswith("a\\xff \N{DOG FACE}")
    shown(tmp_path / "a\udcff").encode()
