"""Image files as uint8 arrays of one shape, and folders of classes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mamlctl.core.errors import DataError
from mamlctl.core.literals import RESIZES

MOST_PIXELS = 40_000_000  # of one image: 160 MB as RGBA, on every core at once

# Before it decodes a pixel, Pillow refuses an image of more than twice its limit, also one inside an icon.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2

# Pillow warns about images above its limit, and about wrong metadata, which are common and not used.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The formats of photographs and drawings, all decoded inside this process. Left out are those that start a
# program (EPS starts Ghostscript), and those of other fields (FITS, GRIB, HDF5), games (DDS, BLP) and films.
FORMATS = {
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "ICNS",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "PSD",
    "QOI",
    "SGI",
    "SUN",
    "TGA",
    "TIFF",
    "WEBP",
    "XBM",
    "XPM",
}

# What Pillow raises for a file that is not an image, or is truncated or damaged.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, struct.error, zlib.error)
HINT = "fix or remove the file"

FILTERS = {name: Image.Resampling[name.upper()] for name in RESIZES}
DEEP = 257.0  # 65535 / 255: from sixteen bits to eight


def read_image(
    data: bytes, display_name: str, *, side: int, channels: int, resize: str = "bilinear"
) -> NDArray[np.uint8]:
    """Decode one image, rotated as its EXIF data say, on white where it is transparent, cropped to a square.

    Args:
        data: the bytes of the file.
        display_name: the name in messages.
        side: height and width of the result in pixels.
        channels: 1 (grey) or 3 (colour).
        resize: a key of `FILTERS`.

    Returns:
        uint8 _CHW.

    Raises:
        DataError: the file is not an image, is cut off or is too large.
    """
    with open_image(data, display_name) as opened:
        image = _in_channels(ImageOps.exif_transpose(opened), channels)
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), method=FILTERS[resize])
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def open_image(
    data: bytes, display_name: str, formats: tuple[str, ...] | None = None, *, hint: str = HINT
) -> Iterator[Image.Image]:
    """Open an image of one of the formats in `FORMATS`; no other code may call `Image.open`.

    Args:
        data: the bytes of the file.
        display_name: the name in messages.
        formats: the allowed formats; None: all of `FORMATS`.
        hint: the hint if it cannot be read.

    Raises:
        DataError: the image cannot be opened, or decoded in the block, or is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats or _available_formats()) as image:
            yield image
    except Image.DecompressionBombError as error:
        message = f"image {display_name} has more than {MOST_PIXELS:,} pixels"
        raise DataError(message, hint="shrink or remove the file") from error
    except DAMAGE as error:
        reason = "not an image of a supported format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot read image {display_name}: {reason}", hint=hint) from error


@cache
def _available_formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read, in the order in which it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name in FORMATS)


def _in_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode as grey or colour."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        deep = np.asarray(image.convert("I"), dtype=np.float64)
        image = Image.fromarray(np.rint(deep.clip(0, 65535) / DEEP).astype(np.uint8))
    elif image.mode == "F":  # has no fixed range: assume 0 to 1, or 0 to 255 if a value is larger than 1
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        image = Image.fromarray(np.rint((values * scale).clip(0, 255)).astype(np.uint8))
    elif image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("L" if channels == 1 else "RGB")
