"""The user's own images: class folders to learn from, files and folders to be told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.data.reading.image_files import class_folders, may_be_image, read_image

FEWEST = 2  # classes: of one alone there is nothing to tell apart


@dataclass(frozen=True)
class Reader:
    """Files -> images of one shape, each remembered by what it held."""

    side: int
    channels: int
    resize: str

    def __call__(self, path: Path) -> tuple[NDArray[np.uint8], bytes]:
        """The image as CHW, and a digest of the file. Raises DataError for what cannot be read as one."""
        try:
            data = path.read_bytes()
        except OSError as error:
            message = f"cannot read image {path}: {error.strerror or error}"
            raise DataError(message, hint="mend it or take it away") from error
        image_CHW = read_image(data, str(path), side=self.side, channels=self.channels, resize=self.resize)
        return image_CHW, hashlib.sha256(data).digest()


@dataclass(frozen=True)
class SupportImages:
    """Images of every class, one class after the other."""

    classes: tuple[str, ...]
    x_ECHW: NDArray[np.uint8]
    y_E: NDArray[np.int64]
    digests: tuple[bytes, ...]  # of the files
    unreadable: tuple[str, ...]  # what was wrong with each file that was left out

    @property
    def counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(np.bincount(self.y_E, minlength=len(self.classes)).tolist())


def read_support(path: Path, read: Reader) -> SupportImages:
    """The class folders of `path`. Raises DataError for fewer than two, or one without a readable image."""
    folders = class_folders(path)
    if len(folders) < FEWEST:
        fact = f"{path} holds {len(folders)} class folder, but it takes {FEWEST} to tell apart"
        raise DataError(fact, hint="put the images of each class into a folder of its own")
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
            raise DataError(
                f"class '{name}' of {path} has no readable image: {why}", hint="add one, or remove its folder"
            )
    y_E = np.array(labels, dtype=np.int64)
    return SupportImages(tuple(folders), np.stack(images), y_E, tuple(digests), tuple(unreadable))


@dataclass(frozen=True)
class Query:
    """A file to be told apart, and its class if its folder says so."""

    path: Path
    label: str | None = None


def find_queries(paths: Sequence[Path], classes: Sequence[str]) -> tuple[list[Query], int]:
    """Every file once, in the order of `paths` and then of names, and how many were named twice.

    A folder's own files have no label; those of the folders in it have that folder's name as label. Raises
    DataError for what is not there, a folder without files, or a folder whose name is no class.
    """
    by_path: dict[Path, Query] = {}
    named = 0
    for path in paths:
        queries = _queries(path, classes)
        if not queries:
            raise DataError(f"{path} holds no images", hint="name files, or a folder that holds some")
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
        raise DataError(f"there is no file or folder {path}", hint="name images, or a folder that holds some")
    flat, queries = [], list[Query]()
    for entry in sorted(path.iterdir()):
        if not may_be_image(Path(entry.name)):
            continue
        if entry.is_file():
            flat.append(Query(entry))
        elif files := [
            file
            for file in sorted(entry.rglob("*"))
            if may_be_image(file.relative_to(entry)) and file.is_file()
        ]:
            if entry.name not in classes:
                fact = f"query folder '{entry.name}' of {path} is no class of the support set"
                raise DataError(
                    fact, hint=f"classes: {', '.join(classes)}; without labels: --query {path / entry.name}"
                )
            queries += [Query(file, entry.name) for file in files]
    return flat + queries
