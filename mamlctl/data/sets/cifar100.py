"""CIFAR-100 (Krizhevsky 2009) for few-shot learning: 100 classes with 600 colour images of 32x32 each.

`cifar-fs` and `fc100` are two splits of its classes. They share one pack, which joins its original parts,
train and test. Its files are pickles, which a safe reader reads directly from the archive. Copies with one
folder of images per class are read too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.formatting import plural
from mamlctl.data.fetching.downloads import Archive
from mamlctl.data.reading.archives import DOWNLOAD_AGAIN, Members, open_members
from mamlctl.data.reading.decoding import ImageFile, ImageShape, decoded
from mamlctl.data.reading.image_files import open_image
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, pack, save_pack
from mamlctl.data.reading.unpickling import load_arrays
from mamlctl.data.sets.class_splits import listed_split
from mamlctl.data.sets.folder_layout import looks_like_image

T = TypeVar("T")
SIDE = 32
CHANNELS = 3
FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
META = "meta"
HOME = "cifar-100"  # the folder of the packs
SIZE = 169_001_437  # bytes of the archive
DIGITS = re.compile(r"\d{1,12}")
FILE_BYTES = 512 * 1024**2  # the largest file, train, has 155 million
HINT = f"give --from {ARCHIVE}, the folder {FOLDER} unpacked from it, or class folders of all its images"


@dataclass(frozen=True)
class CifarPart:
    """One of the two files of images, and what it must contain."""

    file: str
    per_class: int
    md5: str


# The md5s of the files inside the archive, from torchvision.datasets.CIFAR100.
PARTS = (
    CifarPart("train", 500, "16019d7e3df5f24257cddd939b257f8d"),
    CifarPart("test", 100, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
)


def archives() -> tuple[Archive, ...]:
    """The archive, with the address from torchvision, whose releases keep it up to date."""
    from torchvision.datasets import CIFAR100  # imported here, since it imports torch

    return (Archive(ARCHIVE, (CIFAR100.url,), CIFAR100.tgz_md5, SIZE),)


def prepare(
    root: Path, sources: Sequence[Path], on_event: OnEvent, parts: tuple[CifarPart, ...] = PARTS
) -> None:
    """Verify and pack CIFAR-100.

    Args:
        root: the data root.
        sources: the archive, its unpacked folder, a folder that contains either, or class folders of images.
        on_event: receives notices and progress.
        parts: what the two files of images must contain.

    Raises:
        DataError: a file is missing, damaged or not CIFAR-100's, or the pack cannot be written.
    """
    save_pack(_path(root), _packed(_find_source(sources), parts, on_event))


def is_here(root: Path) -> bool:
    """Whether the images, which both data sets share, are in the data root."""
    return is_packed(_path(root))


def open_pack(root: Path, resize: str = "none", *, on_event: OnEvent, name: str = "cifar-fs") -> PackedImages:
    """Return all images, classes in the order of their names.

    Args:
        root: the data root.
        resize: not used, since images keep their size.
        on_event: not used, since nothing is packed.
        name: the data set, for messages.

    Raises:
        DataError: the images are missing or damaged.
    """
    if not is_here(root):
        raise DataError(f"{name} is not in {root}", hint=f"run mamlctl fetch {name}")
    return load_pack(_path(root), name)


def _path(root: Path) -> Path:
    return root / HOME / f"{SIDE}x{SIDE}.npy"


def class_names() -> tuple[str, ...]:
    """Return CIFAR-100's classes in the order of their labels, which is alphabetical."""
    return tuple(sorted(listed_split("cifar-fs")))


def _find_source(sources: Sequence[Path]) -> Path:
    """The archive or the folder of CIFAR's files, among the sources or inside one, or a folder of classes."""
    known = set(class_names())
    for source in sources:
        path = source.resolve()
        if path.is_file():
            return path
        for place in (path, path / FOLDER):
            if all((place / file).is_file() for file in _file_names(PARTS)):
                return place
        if (path / ARCHIVE).is_file():
            return path / ARCHIVE
    for source in sources:
        path = source.resolve()
        # More than one, since a folder train may also be a split.
        if any(len(known.intersection(folders)) > 1 for _, folders, _ in os.walk(path)):
            return path
    places = ", ".join(str(source) for source in sources)
    fact = f"{places} contains neither {ARCHIVE} nor a folder {FOLDER}, nor folders with the names of classes"
    raise DataError(fact, hint=HINT)


def _file_names(parts: Sequence[CifarPart]) -> tuple[str, ...]:
    return (META, *(part.file for part in parts))


def _files(members: Members, parts: Sequence[CifarPart]) -> dict[str, bytes]:
    """Read CIFAR's files from the folder or archive. Raises DataError if one is missing."""
    contents = {}
    for file in _file_names(parts):
        for name in (f"{FOLDER}/{file}", f"{members.path.name}/{file}", file):
            if name in members.names:
                contents[file] = members.read(name)
                break
        else:
            raise DataError(f"{members.path} does not contain the file {FOLDER}/{file}", hint=HINT)
    return contents


def _images_by_class(members: Members, names: Sequence[str]) -> dict[str, list[ImageFile]]:
    """The images of every class: first those below a folder train or of no part, then those below test.

    Images of a part are sorted by the numbers in their names, which is the original order in copies that
    number them.
    """
    by_class: dict[str, list[str]] = {name: [] for name in names}
    for name in members.names:
        path = PurePosixPath(name)
        if path.parent.name in by_class and looks_like_image(path.name):
            by_class[path.parent.name].append(name)

    def order(name: str) -> tuple[bool, list[int], str]:
        path = PurePosixPath(name)
        return PARTS[1].file in path.parts[:-2], [int(digits) for digits in DIGITS.findall(path.name)], name

    return {
        label: [
            ImageFile(label, name, partial(_read_image, members, name)) for name in sorted(files, key=order)
        ]
        for label, files in by_class.items()
    }


def _read_image(members: Members, name: str) -> bytes:
    """The bytes of an image. Raises DataError if it has another size than those of CIFAR-100."""
    data = members.read(name)
    with open_image(data, name) as image:
        if image.size != (SIDE, SIDE):
            message = f"image {name} in {members.path} has {image.width}x{image.height} pixels"
            raise DataError(f"{message}, but CIFAR-100's have {SIDE}x{SIDE}", hint=HINT)
    return data


def _packed_images(
    members: Members, by_class: Mapping[str, Sequence[ImageFile]], per_class: int, on_event: OnEvent
) -> PackedImages:
    for name, files in by_class.items():
        if len(files) != per_class:
            images = f"{len(files):,} {plural(len(files), 'image')}"
            raise DataError(f"{members.path} has {images} of class {name}, not {per_class:,}", hint=HINT)
    files = [file for name in sorted(by_class) for file in by_class[name]]
    images_MCHW = np.empty((len(files), CHANNELS, SIDE, SIDE), dtype=np.uint8)
    shape = ImageShape(SIDE, CHANNELS, "bilinear")
    for number, (_, image_CHW) in enumerate(decoded(files, shape, what="CIFAR-100", on_event=on_event)):
        images_MCHW[number] = image_CHW
    on_event(Notice("CIFAR-100: only the original archive can be verified; this copy has the right counts"))
    return pack(images_MCHW, np.full(len(by_class), per_class, dtype=np.int64), tuple(sorted(by_class)))


def _packed(path: Path, parts: Sequence[CifarPart], on_event: OnEvent) -> PackedImages:
    """All images by class; within a class, in the order of the parts and of their files."""
    names, per_class = class_names(), sum(part.per_class for part in parts)
    with open_members(path, member_bytes=FILE_BYTES) as members:
        by_class = _images_by_class(members, names)
        if any(by_class.values()):
            return _packed_images(members, by_class, per_class, on_event)
        files = _files(members, parts)
    meta_name = f"{META} in {path}"
    if _typed(load_arrays(files[META], meta_name), meta_name, "fine_label_names", list) != list(names):
        fact = f"{meta_name} does not list the {len(names)} classes of CIFAR-100 in their order"
        raise DataError(fact, hint=HINT)
    images_KMCHW = np.empty((len(names), per_class, CHANNELS, SIDE, SIDE), dtype=np.uint8)
    filled = 0
    for number, part in enumerate(parts):
        # Popped, so that the bytes of the file are freed as early as possible.
        rows_MX, labels_M = _read_part(files.pop(part.file), f"{part.file} in {path}", part, names)
        # Stable, so that the images of a class keep the order of the file.
        order_KM = np.argsort(labels_M, kind="stable").reshape(len(names), part.per_class)
        for label, places in enumerate(order_KM):
            # A row has the red plane, then the green, then the blue.
            planes_MCHW = rows_MX[places].reshape(-1, CHANNELS, SIDE, SIDE)
            images_KMCHW[label, filled : filled + part.per_class] = planes_MCHW
        filled += part.per_class
        on_event(Progress("CIFAR-100: read files", number + 1, len(parts)))
    images_MCHW = images_KMCHW.reshape(-1, CHANNELS, SIDE, SIDE)
    return pack(images_MCHW, np.full(len(names), per_class, dtype=np.int64), names)


def _read_part(
    data: bytes, display_name: str, part: CifarPart, names: Sequence[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows of pixels and their labels. Raises DataError for wrong counts first, then for wrong pixels."""
    content = load_arrays(data, display_name)
    rows_MX = _typed(content, display_name, "data", np.ndarray)
    labels = _typed(content, display_name, "fine_labels", list)
    width = CHANNELS * SIDE * SIDE
    if rows_MX.dtype != np.uint8 or rows_MX.shape != (len(labels), width):
        expected = f"{len(labels):,} rows of {width:,} bytes"
        message = f"{display_name} contains {rows_MX.dtype} {rows_MX.shape}, not {expected}"
        raise DataError(message, hint=DOWNLOAD_AGAIN)
    if not all(type(label) is int and 0 <= label < len(names) for label in labels):
        message = f"{display_name} has labels outside 0 to {len(names) - 1}"
        raise DataError(message, hint=DOWNLOAD_AGAIN)
    labels_M = np.array(labels, dtype=np.int64)
    counts = np.bincount(labels_M, minlength=len(names))
    for name, count in zip(names, counts.tolist(), strict=True):
        if count != part.per_class:
            images = f"{count:,} {plural(count, 'image')}"
            message = f"{display_name} has {images} of class {name}, not {part.per_class:,}"
            raise DataError(message, hint=DOWNLOAD_AGAIN)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 != part.md5:
        message = f"{display_name} has CIFAR-100's labels, but not its bytes: md5 {md5} instead of {part.md5}"
        raise DataError(message, hint=DOWNLOAD_AGAIN)
    return rows_MX, labels_M


def _typed(content: object, display_name: str, key: str, kind: type[T]) -> T:
    """The value of `key` in a file's dict. Raises DataError if it is missing or of another type."""
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise DataError(f"{display_name} has no {kind.__name__} called {key}", hint=HINT)
    return value
