"""Tables of regression tasks: which rows are complete, which task and split they belong to, and their digest.

Shapes: M rows of the table, C columns of numbers (inputs, then targets), D inputs, N targets.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.formatting import one_line
from mamlctl.core.literals import SPLITS
from mamlctl.core.problems import Problem, flag
from mamlctl.data.reading.table_files import HINT, SPLIT, TASK, Cells, Columns, Floats, read_cells

TIME_RESOLUTION_NS = 2_000_000_000  # of file times, at worst: two changes within it may have the same time


@dataclass(frozen=True)
class TaskTable:
    """The examples of all tasks, sorted by task and then by value: the order in the file has no influence."""

    columns: Columns
    tasks: tuple[str, ...]  # names, sorted
    counts: NDArray[np.int64]  # rows of each task
    values_MC: Floats  # in the units of the file
    splits: tuple[str, ...]  # of each task; empty without such a column
    left_out: tuple[str, ...] = ()  # rows with missing numbers

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first row of each task."""
        return np.cumsum(self.counts) - self.counts

    @property
    def digest(self) -> str:
        """The sha256 of everything that determines the tasks."""
        facts = (*self.columns.inputs, "", *self.columns.targets, "", *self.splits, "", *self.tasks)
        digest = hashlib.sha256(repr((facts, self.counts.tolist())).encode(errors="surrogateescape"))
        digest.update(self.values_MC.astype("<f8").tobytes())
        return digest.hexdigest()


def read_table(path: Path, inputs: str, targets: str) -> TaskTable:
    """Read the table of all tasks; rows with missing numbers are left out.

    The last table is kept, and not read again while its file is the same.

    Args:
        path: a .csv or .npz file.
        inputs: names or patterns of the input columns, joined by commas.
        targets: the same for the columns to predict.

    Raises:
        DataError: the file cannot be read, or is not such a table.
        SettingsError: it has no columns with these names.
    """
    return _read_table(path, inputs, targets, _stamp(path))


def _stamp(path: Path) -> object:
    """Facts that differ after a change of a file; unique for a file that may have changed just now."""
    with suppress(OSError):
        facts = path.stat()
        if time.time_ns() - facts.st_mtime_ns > TIME_RESOLUTION_NS:
            return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
    return object()


@functools.lru_cache(maxsize=1)
def _read_table(path: Path, inputs: str, targets: str, stamp: object) -> TaskTable:
    cells = read_cells(path, lambda names: _chosen(path, names, inputs, targets))
    if not len(cells.tasks):
        raise DataError(
            f"{path} has no rows" if not len(cells.values_MC) else f"{path} has no column task", hint=HINT
        )
    if "" in cells.tasks:
        place = cells.place(cells.tasks.index(""))
        raise DataError(f"{path}, {place} has no name in column {TASK}", hint="name the task of every row")
    tasks = sorted(set(cells.tasks))
    number = {task: place for place, task in enumerate(tasks)}
    task_M = np.fromiter((number[task] for task in cells.tasks), np.int64, len(cells.tasks))
    whole_M = ~np.isnan(cells.values_MC).any(1)
    if not whole_M.any():
        raise DataError(f"{path} has no row without a missing number", hint=HINT)
    counts = np.bincount(task_M[whole_M], minlength=len(tasks))
    splits = _splits_of(path, cells, tasks) if cells.splits else {}
    # By task, then by the numbers from the first column on. Adding 0 turns -0 into 0, which sorts equally.
    values_MC = cells.values_MC[whole_M] + 0.0
    order = np.lexsort((*values_MC.T[::-1], task_M[whole_M]))
    kept = [tasks[place] for place in np.flatnonzero(counts)]
    return TaskTable(
        columns=cells.columns,
        tasks=tuple(kept),
        counts=counts[counts > 0],
        values_MC=values_MC[order],
        splits=tuple(splits[task] for task in kept) if splits else (),
        left_out=tuple(_incomplete(cells, row) for row in np.flatnonzero(~whole_M).tolist()),
    )


def _incomplete(cells: Cells, row: int) -> str:
    """Where a number is missing."""
    lacking = np.flatnonzero(np.isnan(cells.values_MC[row]))
    names = ", ".join(cells.columns.numbers[column] for column in lacking)
    return f"{cells.place(row)} (task {one_line(cells.tasks[row])}, no {one_line(names)})"


def _splits_of(path: Path, cells: Cells, tasks: Sequence[str]) -> dict[str, str]:
    """The split of each task. Raises DataError for an unknown split, or a task in two of them."""
    splits: dict[str, str] = {}
    for row, (task, split) in enumerate(zip(cells.tasks, cells.splits, strict=True)):
        if split not in SPLITS:
            fact = f"{path}, {cells.place(row)}, column {SPLIT!r} has {one_line(split)!r:.40}"
            raise DataError(fact, hint=f"write {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
        if splits.setdefault(task, split) != split:
            where = f"{path}, {cells.place(row)}"
            fact = f"{where}: task {one_line(task)!r} is in {split}, but above in {splits[task]}"
            raise DataError(fact, hint="put all rows of a task into one split")
    return splits


def _chosen(path: Path, names: Sequence[str], inputs: str, targets: str) -> Columns:
    """The columns that the settings name. Raises SettingsError if there are none, or one is named twice."""
    problems: list[Problem] = []
    wanted: dict[str, tuple[str, ...]] = {}
    for setting, patterns in (("inputs", inputs), ("targets", targets)):
        columns: list[str] = []
        for pattern in patterns.split(","):
            found = _matching(pattern.strip(), [name for name in names if name not in (TASK, SPLIT, "")])
            if not found:
                shown = ", ".join(map(one_line, names[:8])) + (", ..." if len(names) > 8 else "")
                fact = f"{path} has no column {one_line(pattern.strip())!r}; it has {shown or 'none'}"
                problems.append((fact, f"name the {setting} with {flag(setting)}"))
            columns += [name for name in found if name not in columns]
        wanted[setting] = tuple(columns)
    if both := [name for name in wanted["targets"] if name in wanted["inputs"]]:
        fact = f"column {one_line(both[0])!r} is in --inputs and in --targets"
        problems.append((fact, "name it in one of them"))
    if problems:
        raise SettingsError(problems)
    return Columns(wanted["inputs"], wanted["targets"])


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The column with this name, or those that match a pattern, x2 before x10."""
    if pattern in names:
        return [pattern]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return sorted(found, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(20), name))


def read_examples(path: Path, columns: Columns) -> tuple[Floats, Floats | None]:
    """Read the examples of a single task; other columns than the inputs and targets are ignored.

    Args:
        path: a .csv or .npz file.
        columns: the columns of the run.

    Returns:
        The inputs x_MD, and the targets y_MN or None if the file has no target column, in its units.

    Raises:
        DataError: the file cannot be read, lacks a column, or a number is missing.
    """

    def choose(names: Sequence[str]) -> Columns:
        targets = columns.targets if set(columns.targets) & set(names) else ()
        if missing := [name for name in columns.inputs + targets if name not in names]:
            fact = f"{path} has no column {one_line(missing[0])!r}"
            raise DataError(fact, hint="use the columns of the table that the run was trained on")
        return Columns(columns.inputs, targets)

    cells = read_cells(path, choose)
    if not len(cells.values_MC):
        raise DataError(f"{path} has no rows", hint="write one row per example")
    if len(missing := np.argwhere(np.isnan(cells.values_MC))):
        row, column = missing[0]
        fact = f"{path}, {cells.place(row)}, column {one_line(cells.columns.numbers[column])!r} is empty"
        raise DataError(fact, hint="add the number, or remove the row")
    width = len(columns.inputs)
    return cells.values_MC[:, :width], cells.values_MC[:, width:] if cells.columns.targets else None
