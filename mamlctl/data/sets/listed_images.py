"""Images in one folder whose classes and splits are in train.csv, val.csv and test.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from mamlctl.core.errors import DataError
from mamlctl.core.literals import SPLITS

COLUMNS = ("filename", "label")
IMAGES = "images"  # the folder of the images, unless they are next to the lists
HINT = f"list each image once, with the columns {','.join(COLUMNS)}"


def is_list(path: Path) -> bool:
    """Whether there is a list of images at `path`: a CSV file with the columns of `COLUMNS`."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return set(COLUMNS) <= set(_column_names(next(csv.reader([file.readline(1000)]))))


def listed_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every class, sorted by name; the names of classes start with the split.

    Raises:
        DataError: a list cannot be read, or names an image that does not exist or is in another list.
    """
    classes: dict[str, list[Path]] = {}
    lists: dict[Path, str] = {}  # image -> the line that lists it
    splits: dict[str, str] = {}  # label -> split
    for split in SPLITS:
        path = folder / f"{split}.csv"
        for place, name, label in _rows(path) if os.path.lexists(path) else ():
            file = _find_image(folder, name, place)
            if file in lists:
                raise DataError(f"{place} lists {name}, but so does {lists[file]}", hint=HINT)
            lists[file] = place
            if splits.setdefault(label, split) != split:
                fact = f"{place} has class {label!r}, which is also in {splits[label]}.csv"
                raise DataError(fact, hint="list all images of a class in the same file")
            classes.setdefault(f"{split}/{label}", []).append(file)
    return {name: sorted(classes[name]) for name in sorted(classes)}


def _column_names(head: Iterable[str]) -> list[str]:
    return [name.strip().lower() for name in head]


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the place of every row, for messages, and its file name and label."""
    from mamlctl.data.reading.archives import open_regular  # not at the top: it imports tarfile

    number = 1
    try:
        with open_regular(path, HINT) as binary, TextIOWrapper(binary, "utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = names = _column_names(reader.fieldnames or ())
            if missing := [column for column in COLUMNS if column not in names]:
                found = f"the columns {', '.join(map(repr, names))}" if any(names) else "no columns"
                fact = f"{path}, line 1 has {found}; it needs {' and '.join(missing)}"
                raise DataError(fact, hint=HINT)
            for column in COLUMNS:
                if names.count(column) > 1:
                    fact = f"{path}, line 1 has {names.count(column)} columns named {column}"
                    raise DataError(fact, hint="keep one of them")
            for row in reader:
                number = reader.line_num
                name, label = ((row.get(column) or "").strip() for column in COLUMNS)
                if not name or not label:
                    raise DataError(f"{path}, line {number} has no file name or no label", hint=HINT)
                yield f"{path}, line {number}", name, label
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read after line {number}: {error}", hint=HINT) from error


def _find_image(folder: Path, name: str, place: str) -> Path:
    path = Path(name)
    if not path.is_absolute() and ".." not in path.parts:
        with suppress(OSError):  # a name that no file can have
            for file in (folder / path, folder / IMAGES / path):
                if file.is_file():
                    return file
    where = f"{folder} or its folder {IMAGES}"
    raise DataError(f"{place} lists {name!a:.80}, which is not in {where}", hint="fix or remove the line")
