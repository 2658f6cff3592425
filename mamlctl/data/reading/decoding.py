"""Images that lie in class folders, archives or both: found, decoded on all cores, packed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.core.events import OnEvent, Progress
from mamlctl.data.reading.archives import Members
from mamlctl.data.reading.image_files import read_image

AT_A_TIME = 512  # images in work at once: enough for every core, and no more memory than a few megabytes
EVENT_EVERY = 500  # images


@dataclass(frozen=True)
class ImageFile:
    """One image of a class: where it lies, and how to get its bytes."""

    label: str  # its class
    display_name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageShape:
    """What every image becomes."""

    side: int
    channels: int
    resize: str

    @property
    def chw(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.side, self.side


def of_members(members: Members, name: str, label: str) -> ImageFile:
    """An image of an archive."""
    return ImageFile(label, name, lambda: members.read(name))


def of_path(path: Path, root: Path, label: str) -> ImageFile:
    """An image file, told by its path below `root`."""
    return ImageFile(label, str(path.relative_to(root)), path.read_bytes)


def decoded(
    files: Sequence[ImageFile],
    shape: ImageShape,
    *,
    what: str,
    on_event: OnEvent,
    on_bad: Callable[[DataError], None] | None = None,
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Label and pixels of every image, in order, decoded by all cores (Pillow lets threads run meanwhile).

    Args:
        files: the images.
        shape: what each becomes.
        what: the set's name, for progress.
        on_event: gets progress.
        on_bad: gets the error of an image that cannot be read, which is left out.

    Raises:
        DataError: an image cannot be read, and there is no `on_bad`.
    """

    def decode(file: ImageFile) -> NDArray[np.uint8] | DataError:
        try:
            return read_image(
                file.read(), file.display_name, side=shape.side, channels=shape.channels, resize=shape.resize
            )
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"cannot read {file.display_name}: {error.strerror or error}", hint="mend it")

    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), AT_A_TIME):
            part = files[start : start + AT_A_TIME]
            for file, pixels in zip(part, pool.map(decode, part), strict=True):
                done += 1
                if done % EVENT_EVERY == 0:
                    on_event(Progress(f"{what}: read images", done, len(files)))
                if not isinstance(pixels, DataError):
                    yield file.label, pixels
                elif on_bad is None:
                    raise pixels
                else:
                    on_bad(pixels)


def reshaped(
    images_MCHW: NDArray[np.uint8], shape_CHW: tuple[int, int, int], what: str, on_event: OnEvent
) -> Iterator[NDArray[np.uint8]]:
    """The same images in another size, and grey for one channel; bilinear, antialiased where they shrink."""
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


def twins(
    images: Iterable[tuple[str, NDArray[np.uint8]]], pairs: list[tuple[str, str]]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The same images; the labels of every two that are equal to the last bit are put into `pairs`."""
    labels: dict[bytes, str] = {}
    for label, image in images:
        # Not the pixels, which are as many as the set; 8 bytes meet by chance once in 10^10 such sets.
        key = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
        if key in labels:
            pairs.append((labels[key], label))
        labels.setdefault(key, label)
        yield label, image
