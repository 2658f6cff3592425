"""Image files of any kind that Pillow reads -> uint8 arrays of one shape; folders of classes."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mamlctl.core.errors import DataError

# Pillow warns of images above 90 million pixels, and refuses those of twice as many; the latter is enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
DEEP = 257.0  # 65535 / 255: sixteen bits to eight

# Files that nobody means as images, though they lie among them.
NO_IMAGES = {".txt", ".csv", ".json", ".md", ".xml", ".yaml", ".yml", ".py", ".ini", ".db", ".log", ".html"}


def read_image(
    data: bytes, display_name: str, *, side: int, channels: int, resize: str = "bilinear"
) -> NDArray[np.uint8]:
    """One image -> CHW with H = W = `side`, `channels` 1 (grey) or 3 (colour).

    Turned as its EXIF data say; transparent pixels lie on white; a longer side is cut evenly at both ends.
    Raises DataError, with `display_name`, for what is not an image, is cut off or absurdly large.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = _in_channels(ImageOps.exif_transpose(opened), channels)
    # Pillow's words for a file that is no image, cut off or broken, or absurdly large.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        reason = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(
            f"cannot read image {display_name}: {reason}", hint="mend it or take it away"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"image {display_name} is absurdly large", hint="shrink it or take it away"
        ) from error
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), method=FILTERS[resize])
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _in_channels(image: Image.Image, channels: int) -> Image.Image:
    """Any mode -> grey or colour."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        deep = np.asarray(image.convert("I"), dtype=np.float64)
        image = Image.fromarray(np.rint(deep.clip(0, 65535) / DEEP).astype(np.uint8))
    elif image.mode == "F":  # whose range is anyone's choice: 0 to 1, or else 0 to 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        image = Image.fromarray(np.rint((values * scale).clip(0, 255)).astype(np.uint8))
    elif image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("L" if channels == 1 else "RGB")


def class_folders(path: Path) -> dict[str, list[Path]]:
    """The class folders of `path` and the files of each, at any depth, both in order of their names.

    Hidden files and those that plainly are no images are passed over; a class may be empty.
    Raises DataError if `path` is no folder or has no folders.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder", hint="name a folder that holds one folder per class")
    folders = {
        folder.name: sorted(
            file for file in folder.rglob("*") if may_be_image(file.relative_to(folder)) and file.is_file()
        )
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith((".", "__"))
    }
    if not folders:
        raise DataError(
            f"{path} holds no folders", hint="put the images of each class into a folder of its own"
        )
    return folders


def may_be_image(name: Path) -> bool:
    """Whether a file of that name may be an image."""
    return (
        not any(part.startswith((".", "__")) for part in name.parts) and name.suffix.lower() not in NO_IMAGES
    )
