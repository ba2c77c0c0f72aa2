"""From one image file or Pillow image to uint8 pixels, by one stated rule.

- The first frame of an animation is used; the EXIF orientation is applied.
- An image is grey when its mode has one colour channel (1, L, LA, 16-bit grey); all others (palette, CMYK, ...)
  become RGB. A set has one channel when every image is grey, otherwise three, grey ones repeated.
- Alpha, also that of a palette, is composited on black.
- 16-bit grey v becomes round(v / 257), so 0..65535 fills 0..255; nothing is clipped. 16-bit colour keeps the upper
  8 bits, as Pillow reads it. Float images are refused.
- A ``.npy`` file holds uint8 (H, W) or (H, W, C) with any number of channels, taken as it is; all images of a set
  then need that number. One that looks like (C, H, W), with 1, 3 or 4 first and more than 4 twice, is refused.
- A size, when asked for, is reached with Pillow's (antialiased) bicubic filter: "stretch" takes the whole frame to
  it, "crop" the largest centred part of the right shape, "pad" fits the whole frame in and centres it on black.

Nothing here needs torch, so that processes which only decode start fast and stay small.
"""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dsdistill.errors import BadData, InvalidSetting

Pixels = NDArray[np.uint8]
Resize = Literal["stretch", "crop", "pad"]

RULE_VERSION = 1
"""Raised whenever the same file would give other pixels: caches of older versions are then decoded anew."""

PIXEL_LIMIT = 89_478_485
"""Most pixels (height x width) of a file, against decompression bombs; a quarter GiB as RGB."""

FILE_LIMIT = 2**30
"""Most bytes of a file, which is read as a whole."""

# The decoders of these extensions and no others, so that a renamed file cannot reach an exotic one.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
ARRAY = ".npy"
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ARRAY))

# Modes with one colour channel; "I" with all its 16-bit variants.
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


@dataclass(frozen=True)
class Rule:
    """What is asked of the pixels beyond the rule above.

    Attributes:
        size: (H, W) to resize to; None keeps the file's own.
        resize: how that size is reached.
    """

    size: tuple[int, int] | None = None
    resize: Resize = "stretch"

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise InvalidSetting("resize", self.resize, f"choose one of {', '.join(get_args(Resize))}")


def to_pixels(image: Image.Image) -> Pixels:
    """Pixels of a Pillow image by the rule above: uint8 (H, W) when grey, else (H, W, 3).

    Raises:
        ValueError: a float image, or integers beyond 16 bits.
    """
    # Pillow's in-place variant would change the caller's image.
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        return _from_16_bit(np.asarray(turned))
    if turned.mode == "F":
        raise ValueError("float pixels have no agreed range; save it with 8 or 16 bits")
    if turned.mode in ("LA", "La"):
        return _on_black(np.asarray(turned.convert("LA")))
    if turned.mode in ("1", "L") and "transparency" not in turned.info:
        return np.asarray(turned.convert("L"))
    if turned.mode in ("1", "L"):
        return _on_black(np.asarray(turned.convert("L").convert("LA")))
    if turned.has_transparency_data:
        return _on_black(np.asarray(turned.convert("RGBA")))
    return np.asarray(turned.convert("RGB"))


def read_file(path: Path, rule: Rule = Rule()) -> Pixels:
    """Decode one file: uint8 (H, W) when grey, else (H, W, C).

    Raises:
        BadData: missing, unreadable, not an image, truncated, too large, or of an unsupported kind; names the file.
    """
    return decode(path, read_bytes(path), rule)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        BadData: missing, unreadable or larger than `FILE_LIMIT`; names the file.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > FILE_LIMIT:
                raise BadData(f"{shown(path)}: larger than {FILE_LIMIT} bytes; shrink the image first")
            return file.read()
    except OSError as error:
        raise BadData(f"{shown(path)}: cannot be read ({error.strerror}); check the file and its permissions") from None


def decode(path: Path, content: bytes, rule: Rule = Rule()) -> Pixels:
    """Decode the bytes of a file, whose name gives the kind (array or image) and stands in messages.

    Raises:
        BadData: as `read_file`.
    """
    try:
        if _is_array(path):
            return resized(_read_array(content), rule)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_extent(image.height, image.width)
            return resized(to_pixels(image), rule)
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes decoders raise nearly anything
        raise _unreadable(path, error) from None


def probe(path: Path, content: bytes) -> tuple[int, int, int]:
    """(H, W, channels) that a file will decode to, from its header: channels are 1 when grey, 3, or an array's own.

    Raises:
        BadData: not an image, too large, or of an unsupported kind. A damaged body is not noticed.
    """
    try:
        if _is_array(path):
            shape, _, _ = _array_header(content)
            return shape[0], shape[1], shape[2] if len(shape) == 3 else 1
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_extent(image.height, image.width)
            width, height = _stored_extent(image)
            if _orientation(image, content) in _TURNED:
                height, width = width, height
            return height, width, 1 if image.mode in _GREY else 3
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def resized(pixels: Pixels, rule: Rule) -> Pixels:
    """Pixels (H, W) or (H, W, C) taken to the size of the rule; the same ones where they have it or none is set."""
    if rule.size is None or pixels.shape[:2] == rule.size:
        return pixels
    (height, width), (tall, wide) = rule.size, pixels.shape[:2]
    if rule.resize == "stretch":
        return _scaled(pixels, height, width, None)
    if rule.resize == "crop":
        # Cut and scaled in one go: a scaled 20000 x 1 frame would be enormous before it is cut.
        scale = max(height / tall, width / wide)
        part = (min(tall, height / scale), min(wide, width / scale))
        top, left = (tall - part[0]) / 2, (wide - part[1]) / 2
        return _scaled(pixels, height, width, (left, top, left + part[1], top + part[0]))
    scale = min(height / tall, width / wide)
    inner = min(height, max(1, round(tall * scale))), min(width, max(1, round(wide * scale)))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    framed = np.zeros((height, width, *pixels.shape[2:]), np.uint8)
    framed[top : top + inner[0], left : left + inner[1]] = _scaled(pixels, *inner, None)
    return framed


def checked_size(image_size: Any) -> tuple[int, int] | None:
    """``image_size`` as (H, W): an int means a square, None stays None.

    Raises:
        InvalidSetting: anything but a positive int or two of them.
    """
    if image_size is None:
        return None
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    ):
        raise InvalidSetting("image_size", image_size, "give pixels as one int (square) or (height, width), at least 1")
    return sides[0], sides[1]


def shown(path: Path | str) -> str:
    """A path for a message: bytes that are not valid UTF-8 are escaped, so that printing it never fails."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _TooLarge(Exception):
    """More pixels than `PIXEL_LIMIT`."""


def _check_extent(height: int, width: int) -> None:
    if height * width > PIXEL_LIMIT:
        raise _TooLarge(f"{width} x {height}")


def _unreadable(path: Path, error: Exception) -> BadData:
    where = shown(path)
    if isinstance(error, (_TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadData(f"{where}: larger than {PIXEL_LIMIT} pixels ({error}); shrink it first")
    # Some decoders report the in-memory file by its address, which says nothing and differs each time.
    told = "cannot identify image file" if "BytesIO" in str(error) else str(error)
    return BadData(f"{where}: not a readable image ({told}); replace or remove the file")


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ARRAY


def _array_header(content: bytes) -> tuple[tuple[int, ...], bool, int]:
    """Shape, column order and place of the pixels, judged before anything is allocated by them."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a .npy file of version {version}; save it with numpy.save")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    if dtype != np.uint8 or len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of {dtype} {shape}; give uint8 (H, W) or (H, W, C)")
    if len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) > 4:
        raise ValueError(f"an array of {dtype} {shape}, which looks like (C, H, W); give uint8 (H, W) or (H, W, C)")
    _check_extent(shape[0], shape[1])
    if len(content) - file.tell() != math.prod(shape):
        raise ValueError(f"{len(content) - file.tell()} bytes of pixels where the header says {math.prod(shape)}")
    return shape, by_column, file.tell()


def _read_array(content: bytes) -> Pixels:
    shape, by_column, start = _array_header(content)
    array = np.frombuffer(content, np.uint8, offset=start).reshape(shape, order="F" if by_column else "C")
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _stored_extent(image: Image.Image) -> tuple[int, int]:
    """Width and height as stored. For TIFF, versions of Pillow differ on whether the size is of the turned image."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    return image.size if tags is None else (int(tags[256]), int(tags[257]))


def _orientation(image: Image.Image, content: bytes) -> int:
    """The EXIF orientation. Pillow decodes a whole PNG to look for one behind the pixels: only where it may be."""
    if image.format == "PNG" and not any(mark in content for mark in _PNG_EXIF):
        return 1
    return int(image.getexif().get(0x0112, 1))


def _scaled(pixels: Pixels, height: int, width: int, box: tuple[float, float, float, float] | None) -> Pixels:
    if pixels.ndim == 3 and pixels.shape[2] != 3:  # Pillow has no images of this many channels
        planes = [_scaled(np.ascontiguousarray(pixels[..., c]), height, width, box) for c in range(pixels.shape[2])]
        return np.stack(planes, axis=-1)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _from_16_bit(values: NDArray[Any]) -> Pixels:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels beyond 16 bits have no agreed range; save it with 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _on_black(pixels: Pixels) -> Pixels:
    """Composite (H, W, colours + 1) on black: colour * alpha / 255, rounded; grey loses its channel axis."""
    wide = pixels.astype(np.uint16)
    flat = ((wide[..., :-1] * wide[..., -1:] + 127) // 255).astype(np.uint8)
    return flat[..., 0] if flat.shape[-1] == 1 else flat
