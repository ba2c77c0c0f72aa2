import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dsdistill.data import read
from dsdistill.data.decode import PIXEL_LIMIT, Rule, checked_size, decode, probe, read_file, resized, shown, to_pixels
from dsdistill.errors import BadData, InvalidSetting


def stored(path, image, **options):
    image.save(path, **options)
    return path


def read_files(*arguments, **options):
    return read.read_files(*arguments, **options)[0]


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


ORIENTED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".late.png"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path / f"turned{suffix}", grey([1, 2, 3], [4, 5, 6]), exif=exif)
    if suffix == ".late.png":  # the chunk behind the pixels, where the standard allows it too
        content = path.read_bytes()
        start = content.index(b"eXIf") - 4
        stop = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
        end = content.index(b"IEND") - 4
        path.write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    assert read_file(path).tolist() == ORIENTED[orientation]
    assert probe(path, path.read_bytes()) == (*np.shape(ORIENTED[orientation]), 1)


def test_cmyk_jpeg_of_adobe_is_stored_inverted(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    path = stored(tmp_path / "a.jpg", cmyk, quality=100)
    assert b"Adobe" in path.read_bytes()
    assert np.abs(read_file(path).astype(int) - [255, 0, 0]).max() <= 1


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def handmade_png(width, height, depth, colour_type, rows):
    """A PNG of the given raw rows (each begins with its filter byte, 0)."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)


def test_16_bit_colour_keeps_the_upper_8_bits(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(handmade_png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0x12FF, 0xFFFF, 0x0080)))
    assert read_file(path).tolist() == [[[0x12, 0xFF, 0x00]]]


def every_kind(folder):
    """One file of each kind, 2 x 3 pixels."""
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    plain = Image.fromarray(pixels)
    rgb = Image.merge("RGB", [plain] * 3)
    palette = plain.copy()
    palette.putpalette(list(range(256)) * 3)
    images = {"bilevel": plain.convert("1"), "grey": plain, "la": plain.convert("LA"), "palette": palette, "rgb": rgb}
    images |= {"rgba": rgb.convert("RGBA"), "wide": Image.fromarray(pixels.astype(np.uint16))}
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    palette.save(folder / "clear.png", transparency=0)
    plain.save(folder / "key.png", transparency=0)
    for name in ("a.bmp", "a.webp", "a.gif", "a.tif", "a.ppm", "a.jpg"):
        rgb.save(folder / name)
    plain.save(folder / "grey.gif")
    plain.save(folder / "grey.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    np.save(folder / "grey.npy", pixels)
    np.save(folder / "one.npy", pixels[..., None])
    np.save(folder / "five.npy", np.stack([pixels] * 5, axis=-1))
    return sorted(folder.iterdir())


def test_the_header_tells_what_the_pixels_will_be(tmp_path):
    paths = every_kind(tmp_path)
    assert len(paths) == 21
    for path in paths:
        shape = read_file(path).shape
        assert shape[:2] == (2, 3)
        assert probe(path, path.read_bytes()) == (*shape, 1)[:3], path.name


def test_arrays_are_taken_as_they_are(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name, array in (("c", pixels), ("f", np.asfortranarray(pixels))):
        np.save(tmp_path / f"{name}.npy", array)
        assert read_file(tmp_path / f"{name}.npy").tolist() == pixels.tolist()
    np.save(tmp_path / "two.npy", pixels[..., :2])
    np.save(tmp_path / "grey.npy", pixels[..., :1])
    assert read_file(tmp_path / "grey.npy").tolist() == pixels[..., 0].tolist()
    assert read_files("set", [tmp_path / "c.npy", tmp_path / "f.npy"]).shape == (2, 4, 2, 3)
    assert read_files("set", [tmp_path / "two.npy"]).tolist() == [pixels[..., :2].transpose(2, 0, 1).tolist()]
    for paths in ([tmp_path / "c.npy", tmp_path / "two.npy"], [tmp_path / "grey.npy", tmp_path / "c.npy"]):
        with pytest.raises(BadData, match=r"set: images have different numbers of channels: .*c.npy"):
            read_files("set", paths)
    with pytest.raises(BadData, match=r"numbers of channels: 2 \(.*two.npy\) where 3 are needed"):
        read_files("set", [tmp_path / "two.npy"], channels=3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.float32), r"an array of float32 \(2, 2\); give uint8"),
        (np.zeros(4, np.uint8), r"an array of uint8 \(4,\)"),
        (np.zeros((2, 0), np.uint8), r"an array of uint8 \(2, 0\)"),
        (np.zeros((3, 8, 9), np.float32), r"an array of float32 \(3, 8, 9\); give uint8 \(H, W\) or \(H, W, C\)"),
        (np.zeros((3, 8, 9), np.uint8), r"uint8 \(3, 8, 9\), which looks like \(C, H, W\); give uint8 .* \(H, W, C\)"),
        (np.zeros((1, 5, 5), np.uint8), r"looks like \(C, H, W\)"),
        (np.array([[None]]), r"an array of object"),
        (np.zeros((1, PIXEL_LIMIT + 1), np.uint8), rf"larger than {PIXEL_LIMIT} pixels"),
    ],
)
def test_unsuitable_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    for look in (read_file, lambda path: probe(path, path.read_bytes())):
        with pytest.raises(BadData, match=rf"a.npy: .*{message}"):
            look(tmp_path / "a.npy")


def test_an_array_with_a_lying_header_is_refused_before_it_is_allocated(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 10**9), np.uint8)[:1, :1, :1])
    content = (tmp_path / "a.npy").read_bytes().replace(b"(1, 1, 1)", b"(9000, 9000, 900)".ljust(9))
    for body in (content, content[:40], b"\x93NUMPY\x03\0", b"PK\3\4 an npz archive"):
        with pytest.raises(BadData, match=r"a.npy: not a readable image"):
            decode(tmp_path / "a.npy", body)


def test_the_callers_image_is_left_alone():
    image = grey([1, 2], [3, 4])
    image.getexif()[0x0112] = 6
    to_pixels(image)
    assert (image.size, image.getexif()[0x0112], np.asarray(image).tolist()) == ((2, 2), 6, [[1, 2], [3, 4]])


def test_resizing_stretches_the_whole_frame_with_antialiasing(tmp_path):
    stripes = np.zeros((8, 64), np.uint8)
    stripes[:, ::2] = 255
    path = stored(tmp_path / "s.png", Image.fromarray(stripes))
    small = read_file(path, Rule((4, 8)))
    assert small.shape == (4, 8)
    assert np.abs(small.astype(int) - 127).max() <= 12  # plain sampling would give 0 or 255
    assert np.array_equal(small, np.asarray(Image.fromarray(stripes).resize((8, 4), Image.Resampling.BICUBIC)))
    halves = np.repeat([[0] * 8 + [255] * 8], 4, axis=0).astype(np.uint8)
    turned = read_file(stored(tmp_path / "h.png", Image.fromarray(halves)), Rule((6, 4)))
    assert turned[:, [0, 3]].tolist() == [[0, 255]] * 6
    assert read_file(path, Rule((8, 64))).tolist() == stripes.tolist()


def test_cropping_takes_the_centre_and_padding_the_whole_frame():
    steps = np.repeat([[10, 10, 99, 99, 99, 99, 200, 200]], 4, axis=0).astype(np.uint8)
    assert resized(steps, Rule((4, 4), "crop")).tolist() == [[99] * 4] * 4
    assert resized(steps.T, Rule((4, 4), "crop")).tolist() == [[99] * 4] * 4
    padded = resized(steps, Rule((8, 8), "pad"))
    assert padded.tolist() == [[0] * 8] * 2 + steps.tolist() + [[0] * 8] * 2
    assert resized(steps.T, Rule((8, 8), "pad")).tolist() == padded.T.tolist()
    ramp = np.repeat([np.arange(16) * 10], 8, axis=0).astype(np.uint8)
    assert resized(ramp, Rule((4, 4), "crop")).tolist() == [[45, 65, 85, 105]] * 4
    assert resized(ramp, Rule((4, 6), "crop"))[0, [0, -1]].tolist() == [25, 125]
    for policy in ("stretch", "crop", "pad"):
        rule = Rule((5, 7), policy)
        flat = resized(np.full((33, 21, 3), 77, np.uint8), rule)
        assert flat.shape == (5, 7, 3)
        assert set(flat.flatten().tolist()) == ({0, 77} if policy == "pad" else {77})
        assert resized(flat, rule) is flat
    wide = resized(np.full((2, 400), 9, np.uint8), Rule((6, 4), "pad"))
    assert wide.tolist() == [[0] * 4] * 2 + [[9] * 4] + [[0] * 4] * 3  # never less than one row of it


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_any_number_of_channels_is_resized_channel_by_channel(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, channels), dtype=np.uint8)
    for policy in ("stretch", "crop", "pad"):
        rule = Rule((4, 5), policy)
        planes = [resized(np.ascontiguousarray(pixels[..., c]), rule) for c in range(channels)]
        assert np.array_equal(resized(pixels, rule), np.stack(planes, axis=-1))
    colour_too = resized(pixels[..., :2].repeat(2, axis=2)[..., :3].copy(), Rule((4, 5), "crop"))
    assert np.array_equal(colour_too[..., 0], resized(np.ascontiguousarray(pixels[..., 0]), Rule((4, 5), "crop")))


@pytest.mark.parametrize("policy", ["stretch", "crop", "pad"])
def test_extreme_frames_stay_small(tmp_path, policy):
    thin = stored(tmp_path / "thin.png", Image.new("L", (20000, 1), 5))
    one = stored(tmp_path / "one.png", Image.new("RGB", (1, 1), (5, 5, 5)))
    tracemalloc.start()
    for path in (thin, one):
        assert read_file(path, Rule((64, 64), policy)).max() == 5
    assert resized(np.zeros((1, 10**6), np.uint8), Rule((64, 64), policy)).shape == (64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20  # scaled before it is cut, the last one would take 4 GB


def test_odd_sizes(tmp_path):
    assert read_file(stored(tmp_path / "one.png", grey([9]))).tolist() == [[9]]
    assert (
        read_file(stored(tmp_path / "long.png", Image.new("L", (20000, 1), 5)), Rule((2, 2))).tolist() == [[5, 5]] * 2
    )


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
    assert read_files("set", paths, Rule((2, 2))).shape == (8, 1, 2, 2)


def test_images_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    def refuse(*_):
        raise MemoryError

    path = stored(tmp_path / "a.png", grey([1]))
    monkeypatch.setattr("dsdistill.data.read.np.empty", refuse)
    with pytest.raises(
        BadData,
        match=r"set: the images need 0 GB of memory; .* storage='cache', or pass a smaller image_size=",
    ):
        read_files("set", [path])


# Bad files -----------------------------------------------------------------------------------------------


def png_bytes(**options):
    file = io.BytesIO()
    Image.effect_noise((32, 32), 80).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just text",
        b"\xff\xd8\xff text that begins like a JPEG",
        png_bytes()[:200],
        png_bytes()[:-200] + b"\0" * 200,
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 40,
    ],
    ids=["empty", "text", "like jpeg", "truncated", "corrupt", "garbage"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".npy"])
def test_a_bad_file_is_named(tmp_path, content, suffix):
    good = stored(tmp_path / "good.png", Image.new("L", (32, 32)))
    bad = tmp_path / f"bad file{suffix}"
    bad.write_bytes(content)
    with pytest.raises(BadData, match=r"bad file.*: not a readable image .*; replace or remove the file"):
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


@pytest.mark.parametrize("limit", [None, 1000, Image.MAX_IMAGE_PIXELS])
@pytest.mark.parametrize("strict", [False, True])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, strict, limit):
    side = 12_000  # 144 million pixels in a file of a few hundred bytes

    path = tmp_path / "bomb.png"
    path.write_bytes(handmade_png(side, side, 8, 0, b""))
    # Our limit is our own: a program that lifted Pillow's for its own reasons changes nothing.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore", Image.DecompressionBombWarning)
        with pytest.raises(BadData, match=r"bomb.png: larger than 89478485 pixels .* shrink it"):
            read_file(path)
        with pytest.raises(BadData, match=r"bomb.png: larger than 89478485 pixels"):
            probe(path, path.read_bytes())


def test_missing_and_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(BadData, match=r"gone.png: cannot be read \(No such file"):
        read_file(tmp_path / "gone.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(BadData, match=r"a.png: cannot be read \(Permission denied\); check .* permissions"):
        read_file(tmp_path / "a.png")


def test_a_file_too_large_to_read_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dsdistill.data.decode.FILE_LIMIT", 10)
    with pytest.raises(BadData, match=r"a.png: larger than 10 bytes"):
        read_file(stored(tmp_path / "a.png", grey([1])))


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
