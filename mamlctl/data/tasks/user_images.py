"""The user's own images: class folders to adapt on, and files and folders to classify."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.data.reading.archives import read_regular
from mamlctl.data.reading.image_files import HINT, read_image
from mamlctl.data.sets.folder_layout import class_folders, may_be_image

FEWEST = 2  # classes: with one class there is nothing to classify


@dataclass(frozen=True)
class Reader:
    """Reads files as images of one shape."""

    side: int  # pixels
    channels: int
    resize: str

    def __call__(self, path: Path) -> tuple[NDArray[np.uint8], bytes]:
        """Return the image as CHW and the sha256 of the file. Raises DataError if it cannot be read."""
        data = read_regular(path, HINT)
        image_CHW = read_image(data, str(path), side=self.side, channels=self.channels, resize=self.resize)
        return image_CHW, hashlib.sha256(data).digest()


@dataclass(frozen=True)
class SupportImages:
    """The images of every class, ordered by class."""

    classes: tuple[str, ...]
    x_ECHW: NDArray[np.uint8]
    y_E: NDArray[np.int64]
    digests: tuple[bytes, ...]  # of the files
    unreadable: tuple[str, ...]  # the error of each file that was left out

    @property
    def counts(self) -> tuple[int, ...]:
        """Images per class."""
        return tuple(np.bincount(self.y_E, minlength=len(self.classes)).tolist())


def read_support(path: Path, read: Reader) -> SupportImages:
    """Read the class folders of `path`.

    Raises:
        DataError: there are fewer than two class folders, or one has no readable image.
    """
    folders = class_folders(path)
    if len(folders) < FEWEST:
        fact = f"{path} contains {len(folders)} class folder, but at least {FEWEST} are needed"
        raise DataError(fact, hint="put the images of each class into a separate folder")
    images, labels, digests, unreadable = [], [], [], []
    for label, (name, files) in enumerate(folders.items()):
        for file in files:
            try:
                image_CHW, digest = read(file)
            except DataError as error:
                unreadable.append(error.message)
                continue
            images.append(image_CHW)
            labels.append(label)
            digests.append(digest)
        if label not in labels:
            why = unreadable[-1] if files else "the folder is empty"
            message = f"class '{name}' of {path} has no readable image: {why}"
            raise DataError(message, hint="add one, or remove the folder")
    y_E = np.array(labels, dtype=np.int64)
    return SupportImages(tuple(folders), np.stack(images), y_E, tuple(digests), tuple(unreadable))


@dataclass(frozen=True)
class Query:
    """A file to classify, and its class if the name of its folder says it."""

    path: Path
    label: str | None = None


def find_queries(paths: Sequence[Path], classes: Sequence[str]) -> tuple[list[Query], int]:
    """Find the files to classify, each once, in the order of `paths` and then of their names.

    The files directly in a folder have no label; those in a subfolder have its name as their label.

    Args:
        paths: files, and folders of files or of subfolders.
        classes: the classes that a subfolder may be named after.

    Returns:
        The files, and how many were given more than once.

    Raises:
        DataError: a path does not exist, a folder contains no images, or a subfolder is not a class.
    """
    by_path: dict[Path, Query] = {}
    named = 0
    for path in paths:
        queries = _queries(path, classes)
        if not queries:
            raise DataError(f"{path} contains no images", hint="give image files, or a folder of images")
        named += len(queries)
        for query in queries:
            first = by_path.setdefault(query.path.resolve(), query)
            if first.label is None and query.label is not None:
                by_path[query.path.resolve()] = query
    return list(by_path.values()), named - len(by_path)


def _queries(path: Path, classes: Sequence[str]) -> list[Query]:
    if path.is_file():
        return [Query(path)]
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}", hint="give image files, or a folder of images")
    flat, queries = [], list[Query]()
    for entry in sorted(path.iterdir()):
        if not may_be_image(Path(entry.name)):
            continue
        if not entry.is_dir():
            flat.append(Query(entry))
        elif files := [
            file
            for file in sorted(entry.rglob("*"))
            if may_be_image(file.relative_to(entry)) and not file.is_dir()
        ]:
            if entry.name not in classes:
                fact = f"query folder '{entry.name}' of {path} is not a class of the support set"
                hint = f"rename it to one of {', '.join(classes)}, or classify it without labels: "
                raise DataError(fact, hint=f"{hint}--query {path / entry.name}")
            queries += [Query(file, entry.name) for file in files]
    return flat + queries
