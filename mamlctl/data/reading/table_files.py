"""Columns of numbers in CSV and NPZ files, read strictly: every refusal names the row and the column.

Shapes: M rows of the file, C columns of numbers (inputs, then targets), D inputs, N targets.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import warnings
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.formatting import one_line
from mamlctl.data.reading.archives import DAMAGE, open_regular
from mamlctl.data.reading.zip_members import open_member, rest_of_member

TASK, SPLIT = "task", "split"
MOST_BYTES = 2**29  # of a file, and of the arrays in it
MOST_COLUMNS = 10_000
LARGEST = 1e100  # a square of it is far below the largest float64
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
MISSING = ("", "na", "n/a", "nan", "null", "none")  # in lower case
HINT = "write one row per example, with the columns task, split (optional), inputs and targets"
ARRAYS = "store the arrays task, x, y and optionally split by numpy.savez, with one row per example"

SEPARATORS = {";": "semicolons", "\t": "tabs"}  # that some programs write in place of commas

# What reading a damaged .npz file raises; numpy reads the header of an array as a Python literal.
NPZ_DAMAGE = (*DAMAGE, OSError, RuntimeError, SyntaxError, TokenError, TypeError)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Which columns are inputs and which are targets, by name."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def numbers(self) -> tuple[str, ...]:
        """Inputs, then targets."""
        return self.inputs + self.targets


@dataclass(frozen=True)
class Cells:
    """The chosen columns of a file, row by row in its order."""

    columns: Columns
    values_MC: Floats  # NaN where a number is missing
    lines: Sequence[int] | None  # of each row of a CSV file; None: rows of arrays
    tasks: Sequence[str]  # empty without such a column
    splits: Sequence[str]  # the same

    def place(self, row: int) -> str:
        """Where a row is in the file, for messages."""
        return f"row {row}" if self.lines is None else f"line {self.lines[row]}"


# The names of all columns -> the ones to read.
Choose = Callable[[Sequence[str]], Columns]


def read_cells(path: Path, choose: Choose) -> Cells:
    """Read the columns that `choose` names, and the columns task and split.

    Raises DataError if the file cannot be read, or is not a table of finite numbers; a number may be missing.
    """
    with open_regular(path, "give the path of a .csv or .npz file that can be read") as file:
        size = file.seek(0, 2)
        if size > MOST_BYTES:
            fact = f"{path} has {size:,} bytes, more than the limit of {MOST_BYTES:,}"
            raise DataError(fact, hint="use float32 arrays in an .npz file, or fewer rows")
        file.seek(0)
        if path.suffix.lower() == ".npz":
            return _read_npz(path, file, choose)
        with TextIOWrapper(file, "utf-8-sig", newline="") as text:
            return _read_csv(path, text, choose)


def _read_csv(path: Path, file: TextIOWrapper, choose: Choose) -> Cells:
    number = 1
    try:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        if not any(names):
            raise DataError(f"{path} has no columns: its first line is empty", hint=HINT)
        _check_names(f"{path}, line 1", names)
        columns = choose(names)
        at = [names.index(name) for name in columns.numbers]
        task_at, split_at = (names.index(name) if name in names else None for name in (TASK, SPLIT))
        numbers, lines, tasks, splits = array("d"), array("q"), list[str](), list[str]()
        known: dict[str, str] = {}  # so that equal names are stored once
        for row in reader:
            number = reader.line_num
            if not "".join(row).strip():  # also a row of empty cells, as spreadsheets write
                continue
            if len(row) != len(names):
                fact = f"{path}, line {number} has {len(row)} cells, but the header has {len(names)}"
                raise DataError(fact, hint="separate cells by commas, and quote those that contain one")
            for place in at:
                numbers.append(_number(row[place], path, number, names[place]))
            lines.append(number)
            for text_at, texts in ((task_at, tasks), (split_at, splits)):
                if text_at is not None:
                    text = row[text_at].strip()
                    texts.append(known.setdefault(text, text))
    except (csv.Error, UnicodeDecodeError) as error:
        fact = f"{path} cannot be read after line {number}: {error}"
        raise DataError(fact, hint="save it as a CSV file in UTF-8") from error
    values_MC = np.frombuffer(numbers, dtype=np.float64).reshape(len(lines), len(at))
    return Cells(columns, values_MC, lines, tasks, splits)


def _check_names(where: str, names: Sequence[str]) -> None:
    if len(names) > MOST_COLUMNS:
        fact = f"{where} has {len(names):,} columns, more than the limit of {MOST_COLUMNS:,}"
        raise DataError(fact, hint="leave out some of them")
    if repeated := [name for name, count in Counter(names).items() if name and count > 1]:
        fact = f"{where} has {names.count(repeated[0])} columns named {one_line(repeated[0])!r}"
        raise DataError(fact, hint="keep one of them")
    if len(names) == 1 and (other := [sign for sign in SEPARATORS if sign in names[0]]):
        fact = f"{where} has no column apart from {one_line(names[0])!r:.80}"
        raise DataError(fact, hint=f"separate cells by commas, not by {SEPARATORS[other[0]]}")


def _number(text: str, path: Path, line: int, column: str) -> float:
    """The number in a cell, NaN if it is missing."""
    stripped = text.strip(" \t")
    if not NUMBER.fullmatch(stripped):
        if stripped.lower() in MISSING:
            return math.nan
        _refuse(path, f"line {line}", column, f"has {one_line(text)!r:.40}, which is not a number")
    value = float(stripped)
    if abs(value) > LARGEST:
        _refuse(path, f"line {line}", column, f"has {stripped:.40}, which is beyond {LARGEST:g}")
    return value


def _refuse(path: Path, place: str, column: str, why: str) -> NoReturn:
    hint = "write a finite number such as -1.5e-3, or leave the cell empty if it is missing"
    raise DataError(f"{path}, {place}, column {one_line(column)!r} {why}", hint=hint)


def _read_npz(path: Path, file: Any, choose: Choose) -> Cells:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            if sum(info.file_size for info in members.values()) > MOST_BYTES:
                raise DataError(f"{path} expands to more than {MOST_BYTES:,} bytes", hint="store fewer rows")
            columns_of = {
                name: _columns(name, shape)
                for name, shape in ((name, _shape(path, archive, info)) for name, info in members.items())
                if name not in (TASK, SPLIT)
            }
            texts = [name for name in (TASK, SPLIT) if name in members]
            names = [*itertools.chain(*columns_of.values()), *texts]
            _check_names(str(path), names)
            columns = choose(names)
            chosen = set(columns.numbers)
            used = [name for name, own in columns_of.items() if chosen.intersection(own)]
            arrays = {name: _array(path, archive, members[name]) for name in (*used, *texts)}
    except NPZ_DAMAGE as error:
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}", hint=ARRAYS) from error
    parts = {name: _numbers(path, name, arrays[name]) for name in used}
    rows = len(parts[used[0]])
    if odd := [name for name, values in arrays.items() if not values.shape or len(values) != rows]:
        fact = f"{path}: array {odd[0]} has shape {arrays[odd[0]].shape}, but {used[0]} has {rows} rows"
        raise DataError(fact, hint=ARRAYS)
    by_name = dict(
        itertools.chain.from_iterable(zip(columns_of[name], parts[name].T, strict=True) for name in used)
    )
    values_MC = np.stack([by_name[name] for name in columns.numbers], axis=1)
    odd_MC = np.isinf(values_MC) | (np.abs(values_MC) > LARGEST)
    if odd_MC.any():
        row, column = np.argwhere(odd_MC)[0]
        _refuse(
            path, f"row {row}", columns.numbers[column], f"has {values_MC[row, column]:g}, which is too large"
        )
    tasks, splits = (_texts(path, name, arrays[name]) if name in arrays else [] for name in (TASK, SPLIT))
    return Cells(columns, values_MC, None, tasks, splits)


def _columns(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names of an array's columns."""
    if len(shape) != 2 or shape[1] == 1:
        return [name]
    return [f"{name}{column + 1}" for column in range(min(shape[1], MOST_COLUMNS + 1))]


def _shape(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    with open_member(archive, info) as member:
        return _header(path, member, info)[0]


def _header(
    path: Path, member: IO[bytes], info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape of an array, whether its columns are contiguous, and its type."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        fact = f"{path}: {info.filename} has format {version}, which numpy.savez does not write"
        raise DataError(fact, hint=ARRAYS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers that Python 2 has written
        shape, fortran, dtype = read[version](member)
    size = info.file_size - member.tell()
    if not dtype.hasobject and size != math.prod(shape) * dtype.itemsize:
        fact = f"{path}: {info.filename} has {size:,} bytes, which is not its shape {shape}"
        raise DataError(fact, hint=ARRAYS)
    return shape, fortran, dtype


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """An array of an .npz file, without objects, of no other size than its bytes."""
    with open_member(archive, info) as member:
        shape, fortran, dtype = _header(path, member, info)
        if dtype.hasobject or dtype.kind not in "fiuUS":
            fact = f"{path}: array {info.filename} has type {dtype}, which is not allowed"
            raise DataError(fact, hint=ARRAYS)
        data = rest_of_member(member, info)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _numbers(path: Path, name: str, values: NDArray[Any]) -> Floats:
    if values.dtype.kind not in "fiu" or values.ndim not in (1, 2) or values.size == 0:
        fact = f"{path}: array {name} has type {values.dtype} and shape {values.shape}"
        raise DataError(fact, hint="store rows of numbers, with shape (rows,) or (rows, columns)")
    return values.reshape(len(values), -1).astype(np.float64)


def _texts(path: Path, name: str, values: NDArray[Any]) -> list[str]:
    if values.dtype.kind not in "iuUS" or values.ndim != 1:
        fact = f"{path}: array {name} has type {values.dtype} and shape {values.shape}"
        raise DataError(fact, hint="store one text or whole number per row")
    try:
        texts = [
            value.decode() if isinstance(value, bytes) else str(value).encode().decode()
            for value in values.tolist()
        ]
    except ValueError as error:  # bytes that are not UTF-8, or half of a surrogate pair
        raise DataError(f"{path}: array {name} is not text: {error}", hint=ARRAYS) from error
    return [text.strip() for text in texts]
