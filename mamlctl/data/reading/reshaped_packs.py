"""Packs in other shapes than a data set's own, made once from its pack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamlctl.core.events import OnEvent, Progress
from mamlctl.data.reading.decoding import EVENT_EVERY
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, stream_pack

FILE = "{side}x{side}x{channels}-{digest}.npy"


def open_reshaped(
    packed: PackedImages, shape_CHW: tuple[int, int, int], home: Path, name: str, on_event: OnEvent
) -> PackedImages:
    """Open the images of a pack in another shape, with a pack of their own.

    Args:
        packed: all images of the data set.
        shape_CHW: the new shape, which is square.
        home: the folder of the data set's packs.
        name: the data set.
        on_event: receives progress.

    Raises:
        DataError: the pack is damaged, or cannot be written.
    """
    path = home / FILE.format(side=shape_CHW[1], channels=shape_CHW[0], digest=packed.digest[:12])
    if not is_packed(path):
        labels = np.repeat(packed.names, packed.counts).tolist()
        images = _reshaped(packed.images_MCHW, shape_CHW, f"{name}: reshape", on_event)
        stream_pack(path, shape_CHW, zip(labels, images, strict=True))
    return load_pack(path, name)


def drop_reshaped(home: Path) -> None:
    """Let `open_reshaped` make the packs of a data set again."""
    for path in home.glob(FILE.format(side="*", channels="*", digest="*")):
        path.with_suffix(".json").unlink(missing_ok=True)


def _reshaped(
    images_MCHW: NDArray[np.uint8], shape_CHW: tuple[int, int, int], what: str, on_event: OnEvent
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images in another shape, resized with an antialiased bilinear filter.

    Args:
        images_MCHW: the images.
        shape_CHW: the new shape; one channel makes them grey, three repeat grey ones.
        what: the description in progress events.
        on_event: receives progress.
    """
    channels, height, width = shape_CHW
    for number, image_CHW in enumerate(images_MCHW, 1):
        image = Image.fromarray(image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0))
        image = image.convert("L" if channels == 1 else "RGB").resize(
            (width, height), Image.Resampling.BILINEAR
        )
        pixels = np.asarray(image)
        yield pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        if number % EVENT_EVERY == 0:
            on_event(Progress(what, number, len(images_MCHW)))
