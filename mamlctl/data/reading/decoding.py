"""Image files in folders or archives, decoded on all cores."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.events import OnEvent, Progress
from mamlctl.data.reading.image_files import read_image

AT_A_TIME = 512  # images decoded at once: enough for every core, and only a few megabytes of memory
BATCH = 16  # images per job of a thread; one per job took 15 % more processor time
EVENT_EVERY = 500  # images


@dataclass(frozen=True)
class ImageFile:
    """One image of a class, and a function that reads its bytes and raises DataError if it cannot."""

    label: str  # its class
    display_name: str  # its name in messages
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageShape:
    """The shape to which every image is converted."""

    side: int  # height and width in pixels
    channels: int  # 1 (grey) or 3 (colour)
    resize: str  # a key of `FILTERS`

    @property
    def chw(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.side, self.side


def decoded(
    files: Sequence[ImageFile],
    shape: ImageShape,
    *,
    what: str,
    on_event: OnEvent,
    on_bad: Callable[[DataError], None] | None = None,
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the label and the pixels of every image, in order; threads decode on all cores.

    Args:
        files: the images.
        shape: the shape of the result.
        what: the name of the data set, for progress.
        on_event: receives progress.
        on_bad: receives the error of each image that cannot be read; these images are left out.

    Yields:
        The label of an image, and its pixels, uint8 _CHW.

    Raises:
        DataError: an image cannot be read, and `on_bad` is None.
    """

    def decode(file: ImageFile) -> NDArray[np.uint8] | DataError:
        try:
            return read_image(
                file.read(), file.display_name, side=shape.side, channels=shape.channels, resize=shape.resize
            )
        except DataError as error:
            return error

    def decode_batch(batch: Sequence[ImageFile]) -> list[NDArray[np.uint8] | DataError]:
        return [decode(file) for file in batch]

    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), AT_A_TIME):
            part = files[start : start + AT_A_TIME]
            batches = [part[first : first + BATCH] for first in range(0, len(part), BATCH)]
            pixels_of_part = itertools.chain.from_iterable(pool.map(decode_batch, batches))
            for file, pixels in zip(part, pixels_of_part, strict=True):
                done += 1
                if done % EVENT_EVERY == 0:
                    on_event(Progress(f"{what}: read images", done, len(files)))
                if not isinstance(pixels, DataError):
                    yield file.label, pixels
                elif on_bad is None:
                    raise pixels
                else:
                    on_bad(pixels)


def twins(
    images: Iterable[tuple[str, NDArray[np.uint8]]], pairs: list[tuple[str, str]]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the same images, and append the labels of every two identical ones to `pairs`."""
    labels: dict[bytes, str] = {}
    for label, image in images:
        # A digest instead of the pixels, to save memory. 8 bytes collide by chance in one of 10^10 such sets.
        key = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
        if key in labels:
            pairs.append((labels[key], label))
        labels.setdefault(key, label)
        yield label, image
