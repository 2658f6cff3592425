"""The form that all tasks of the user's code have in common: shapes, and classes or values.

Shapes: E examples of a set, D inputs or C H W of an image, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import SettingsError
from mamlctl.core.formatting import with_article
from mamlctl.core.literals import TaskType

Arrays = tuple[NDArray[Any], ...]  # of the four SETS
SETS = ("support_x", "support_y", "query_x", "query_y")


@dataclass(frozen=True)
class TaskForm:
    """What all tasks have in common."""

    example_shape: tuple[int, ...]  # C, H, W or D
    support: int  # examples of the support set
    query: int
    ways: int  # classes; 1 for regression
    target_shape: tuple[int, ...] = ()  # of one example in regression: empty, or N

    @classmethod
    def of(cls, arrays: Arrays, where: str) -> TaskForm:
        """The form of a task. Raises SettingsError if no task may have it."""
        x, y, query_x, _ = arrays
        if x.ndim not in (2, 4) or not x.size or not query_x.size:
            shapes = f"support_x of {where} has the shape {x.shape}, and query_x {query_x.shape}"
            raise SettingsError(
                [(shapes, "return (examples, inputs) or (examples, channels, height, width)")]
            )
        sizes = x.shape[1:], len(x), len(query_x)
        if y.dtype.kind == "f":
            if y.ndim not in (1, 2) or not y.size:
                fact = f"support_y of {where} has the shape {y.shape}"
                raise SettingsError([(fact, "return one target per example, or (examples, targets)")])
            return cls(*sizes, 1, y.shape[1:])
        labels = np.unique(y).tolist()
        ways = len(labels)
        if labels != list(range(ways)):
            some = f"{', '.join(map(str, labels[:5]))}{', ...' if ways > 5 else ''}"
            fact = f"support_y of {where} has the labels {some}"
            raise SettingsError([(fact, "number the classes of each task 0, 1, ..., whatever they are")])
        if ways < 2:
            fact = f"support_y of {where} has integers of one class"
            raise SettingsError(
                [(fact, "return 2 classes or more, or floating-point targets for regression")]
            )
        if len(query_x) % ways:
            fact = f"query_x of {where} has {len(query_x)} examples, which {ways} classes do not divide"
            raise SettingsError([(fact, "return a multiple of the number of classes")])
        return cls(*sizes, ways)

    @property
    def task_type(self) -> TaskType:
        """Integer labels are classes, and floating-point targets are values."""
        return "regression" if self.ways == 1 else "classification"

    @property
    def shots(self) -> int:
        """Support examples per class; all of them in regression."""
        return self.support // self.ways

    @property
    def queries(self) -> int:
        """Query examples per class, on average."""
        return self.query // self.ways

    @property
    def targets(self) -> int:
        """The values to predict in regression."""
        return self.target_shape[0] if self.target_shape else 1

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that follow from it."""
        sizes = {"task_type": self.task_type, "shots": self.shots, "queries": self.queries}
        return sizes if self.ways == 1 else {"ways": self.ways, **sizes}

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that it implies unless they are given: vectors need another network than images."""
        return {"net": "mlp"} if len(self.example_shape) == 1 else {}

    def check(self, arrays: Arrays, where: str) -> None:
        """Raise SettingsError unless a task has these shapes, and labels or targets as they are here."""
        sizes = self.support, self.support, self.query, self.query
        for name, array, examples in zip(SETS, arrays, sizes, strict=True):
            is_y = name.endswith("y")
            expected = (examples, *(self.target_shape if is_y else self.example_shape))
            if array.shape != expected:
                fact = f"{name} of {where} has the shape {array.shape}, not {expected}"
                hint = "return the same shapes for all tasks, with as many labels or targets as examples"
                raise SettingsError([(fact, hint)])
            if is_y and (array.dtype.kind == "f") != (self.ways == 1):
                kind = "integers" if self.ways > 1 else "floating-point numbers"
                fact = f"{name} of {where} has the dtype {array.dtype}, but others are {kind}"
                raise SettingsError(
                    [(fact, "return integer labels, or floating-point targets, for all tasks")]
                )

    def has_valid(self, sets: Sequence[NDArray[Any]]) -> bool:
        """Whether the values of several tasks, stacked along a first axis, pass `check_values`."""
        _, support_y, _, query_y = sets
        if not all(np.isfinite(array).all() for array in sets):
            return False
        if self.ways == 1:
            return True
        sorted_E = np.arange(self.ways).repeat(self.shots)
        in_range = query_y.min() >= 0 and query_y.max() < self.ways
        return bool(in_range) and bool((np.sort(support_y, axis=1) == sorted_E).all())

    def check_values(self, arrays: Sequence[NDArray[Any]], where: str) -> None:
        """Raise SettingsError unless numbers are finite, and labels those of the classes."""
        for name, array in zip(SETS, arrays, strict=True):
            if not np.isfinite(array).all():
                fact = f"{name} of {where} has numbers that are not finite"
                raise SettingsError([(fact, "return finite numbers")])
        if self.ways == 1:
            return
        for name, y in (("support_y", arrays[1]), ("query_y", arrays[3])):
            if y.min() < 0 or y.max() >= self.ways:
                label = y.min() if y.min() < 0 else y.max()
                fact = f"{name} of {where} has the label {label}, but there are {self.ways} classes"
                raise SettingsError([(fact, f"use labels from 0 to {self.ways - 1}")])
        counts = np.bincount(arrays[1].astype(np.int64), minlength=self.ways)
        if (counts != counts[0]).any():
            few, most = counts.argmin(), counts.argmax()
            fact = (
                f"support_y of {where} has label {few} {counts[few]} times, but {most} {counts[most]} times"
            )
            raise SettingsError([(fact, "return as many support examples for each class")])


def four_arrays(made: object, where: str) -> Arrays:
    """The four arrays of a task. Raises SettingsError for anything else."""
    if not isinstance(made, tuple | list) or len(made) != len(SETS):
        kind = f"{len(made)} values" if isinstance(made, tuple | list) else with_article(type(made).__name__)
        raise SettingsError([(f"{where} returned {kind}", f"return four arrays: {', '.join(SETS)}")])
    return tuple(_array(value, f"{name} of {where}") for name, value in zip(SETS, made, strict=True))


def _array(value: Any, what: str) -> NDArray[Any]:
    if hasattr(value, "detach"):  # a tensor of torch
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    kinds = "iuf" if "_y of" in what else "iufb"
    if isinstance(value, np.ma.MaskedArray):
        raise SettingsError([(f"{what} is a masked array", "fill in the numbers that are masked")])
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        kind = (
            f"the dtype {value.dtype}"
            if isinstance(value, np.ndarray)
            else f"the type {type(value).__name__}"
        )
        raise SettingsError(
            [(f"{what} has {kind}", "return numbers in an array of numpy or a tensor of torch")]
        )
    if value.dtype.kind == "f" and value.dtype.itemsize > np.dtype(np.float64).itemsize:
        return value.astype(np.float64)  # a long double has bytes without a meaning
    return value
