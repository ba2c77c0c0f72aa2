"""From image files and Pillow images to uint8 tensors, by one stated rule.

- The first frame of an animation is used; the EXIF orientation is applied.
- An image is grey when its mode has one colour channel (1, L, LA, 16-bit grey); all others (palette, CMYK, ...)
  become RGB. A set has one channel when every image is grey, otherwise three, grey ones repeated.
- Alpha, also that of a palette, is composited on black.
- 16-bit grey v becomes round(v / 257), so 0..65535 fills 0..255; nothing is clipped. Float images are refused.
- A size, when asked for, is reached by stretching the whole frame with Pillow's (antialiased) bicubic filter.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dsdistill.errors import BadData, InvalidSetting

Pixels = NDArray[np.uint8]
# The decoders of these extensions and no others, so that a renamed file cannot reach an exotic one.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"))

logger = logging.getLogger("dsdistill")


def to_pixels(image: Image.Image) -> Pixels:
    """Pixels of a Pillow image by the rule above: uint8 (H, W) when grey, else (H, W, 3).

    Raises:
        ValueError: a float image, or integers beyond 16 bits.
    """
    # Pillow's in-place variant would change the caller's image.
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        return _from_16_bit(np.asarray(turned).astype(np.int64))
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


def read_file(path: Path, size: tuple[int, int] | None = None) -> Pixels:
    """Decode one file; ``size`` is (H, W) in pixels, None keeps the file's own.

    Raises:
        BadData: missing, unreadable, not an image, truncated, too large, or of an unsupported kind; names the file.
    """
    where = shown(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            pixels = to_pixels(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadData(
            f"{where}: larger than {Image.MAX_IMAGE_PIXELS} pixels ({error}); "
            "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except (PermissionError, FileNotFoundError) as error:
        raise BadData(f"{where}: cannot be read ({error.strerror}); check the file and its permissions") from None
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes decoders raise nearly anything
        raise BadData(f"{where}: not a readable image ({error}); replace or remove the file") from None
    if size is not None and pixels.shape[:2] != size:
        pixels = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return pixels


def read_files(
    name: str, paths: Sequence[Path], size: tuple[int, int] | None = None, channels: int | None = None
) -> Tensor:
    """Decode many files with a pool of threads: uint8 (N, C, H, W) in the order of ``paths``.

    Args:
        name: what to call the set in messages.
        size: (H, W) to resize to; None demands that all files have one size.
        channels: 1 or 3; None takes 1 when every image is grey.

    Raises:
        BadData: a bad file, mixed sizes, or a colour image where one channel was asked for.
    """
    logger.info("%s: decoding %d images", name, len(paths))
    workers = min(8, os.cpu_count() or 1)
    sizes: Counter[tuple[int, int]] = Counter()
    first_coloured: Path | None = None
    buffer: Pixels | None = None
    with ThreadPoolExecutor(workers) as pool:
        for index, pixels in enumerate(pool.map(partial(read_file, size=size), paths)):
            height, width = pixels.shape[:2]
            sizes[height, width] += 1
            if pixels.ndim == 3 and first_coloured is None:
                first_coloured = paths[index]
            if buffer is None:
                buffer = _allocate(name, (len(paths), 3, height, width))
            if buffer.shape[2:] == (height, width):
                buffer[index] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if buffer is None or len(sizes) > 1:
        raise BadData(f"{name}: {_mixed(sizes)}")
    if channels == 1 and first_coloured is not None:
        raise BadData(
            f"{shown(first_coloured)}: a colour image where all images so far (the train split) are grey; "
            "convert it to grey, or the others to colour"
        )
    if channels is None:
        channels = 1 if first_coloured is None else 3
    return torch.from_numpy(buffer if channels == 3 else np.ascontiguousarray(buffer[:, :1]))


def check_files(paths: Sequence[Path], size: tuple[int, int] | None, expected: tuple[int, int]) -> None:
    """Decode files and forget them, so that a bad one is found before hours of work and not after.

    Args:
        size: (H, W) to resize to, or None.
        expected: (H, W) that every image must have then.

    Raises:
        BadData: a bad file, or one of another size; names it.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        shapes = pool.map(lambda path: read_file(path, size).shape[:2], paths)
        for path, shape in zip(paths, shapes, strict=True):
            if shape != expected:
                raise BadData(
                    f"{shown(path)}: {shape[0]} x {shape[1]} pixels where the training images have "
                    f"{expected[0]} x {expected[1]}; give image_size=... to resize all"
                )


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


def shown(path: Path) -> str:
    """A path for a message: bytes that are not valid UTF-8 are escaped, so that printing it never fails."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _allocate(name: str, shape: tuple[int, ...]) -> Pixels:
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        gigabytes = math.prod(shape) / 1e9
        raise BadData(f"{name}: the images need {gigabytes:.0f} GB of memory; pass a smaller image_size=") from None


def _from_16_bit(values: NDArray[np.int64]) -> Pixels:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels beyond 16 bits have no agreed range; save it with 8 or 16 bits")
    return ((values + 128) // 257).astype(np.uint8)


def _on_black(pixels: Pixels) -> Pixels:
    """Composite (H, W, colours + 1) on black: colour * alpha / 255, rounded; grey loses its channel axis."""
    wide = pixels.astype(np.uint16)
    flat = ((wide[..., :-1] * wide[..., -1:] + 127) // 255).astype(np.uint8)
    return flat[..., 0] if flat.shape[-1] == 1 else flat


def _mixed(sizes: Counter[tuple[int, int]]) -> str:
    common = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sizes.most_common(5))
    rest = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    return f"images have mixed sizes, height x width: {common}{rest}; pass image_size= to resize them all"
