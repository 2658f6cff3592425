"""Regression tasks from a table: standardised, divided into splits, and drawn by number.

Draw number i of a split takes one of its tasks and some of that task's rows. Each pass over the split draws
every task once, in an order of its own, so i determines the pass and the place in it.

Shapes: T drawn tasks, M rows, D inputs, N targets, E rows of a set, S tasks of the split, C columns (D + N).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.literals import SPLITS
from mamlctl.data.counter_rng import k_smallest, random_word_rows, random_words, shuffled
from mamlctl.data.reading.table_files import Floats
from mamlctl.data.reading.tables import TaskTable
from mamlctl.data.tasks.episodes import Episodes, MiniBatches, StreamSettings, Tasks, to_device_no_sync

# Rows that are drawn at once, for many calls of `episodes`: most of a draw's time is its number of calls.
DRAWN = 2**16


@dataclass(frozen=True)
class Standardisation:
    """The mean and the standard deviation of each column over the rows of the training tasks."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    mean: tuple[float, ...]  # of the inputs, then of the targets
    deviation: tuple[float, ...]  # the same; 1 for a constant column, which has no scale

    @property
    def variances(self) -> tuple[float, ...]:
        """The factor that turns a squared error of each target into the units of the table."""
        return tuple(deviation**2 for deviation in self.deviation[len(self.inputs) :])

    @property
    def score_unit(self) -> float:
        """What the score is multiplied by: the variance of a single target.

        Errors of several targets have different units, so their mean keeps that of the standardised ones.
        """
        return self.variances[0] if len(self.targets) == 1 else 1.0

    def apply(self, values_MC: Floats) -> Floats:
        """Standardise inputs and targets, or inputs alone."""
        width = values_MC.shape[1]
        scaled: Floats = (values_MC - self.mean[:width]) / self.deviation[:width]
        return scaled

    def inputs_of(self, scaled_MD: Floats) -> Floats:
        """Standardised inputs in the units of the table."""
        last = len(self.inputs)
        values: Floats = scaled_MD * self.deviation[:last] + self.mean[:last]
        return values

    def targets_of(self, outputs_MN: Floats) -> Floats:
        """The predictions of the network in the units of the table."""
        first = len(self.inputs)
        values: Floats = outputs_MN * self.deviation[first:] + self.mean[first:]
        return values


def standardisation_of(table: TaskTable, training: Sequence[str]) -> Standardisation:
    """The statistics of the training tasks; exact sums make them equal on every machine.

    Args:
        table: all tasks.
        training: the names of the training tasks.
    """
    chosen = set(training)
    of_training_M = np.repeat([task in chosen for task in table.tasks], table.counts)
    values_MC = table.values_MC[of_training_M]
    means, deviations = [], []
    for column in values_MC.T:
        mean = math.fsum(column.tolist()) / len(column)
        # As a product: the function for powers is not rounded equally on every machine.
        variance = math.fsum(((column - mean) * (column - mean)).tolist()) / len(column)
        constant = bool((column == column[0]).all())
        means.append(float(column[0]) if constant else mean)
        deviations.append(1.0 if constant or variance == 0 else math.sqrt(variance))
    return Standardisation(table.columns.inputs, table.columns.targets, tuple(means), tuple(deviations))


def divided(table: TaskTable, usable: Sequence[str], fractions: str, seed: int) -> dict[str, tuple[str, ...]]:
    """Divide tasks into train, val and test, by the column split or at random.

    Args:
        table: all tasks.
        usable: the tasks that are divided.
        fractions: without such a column: the shares of train, val and test, such as 64-16-20.
        seed: of the random order.
    """
    if table.splits:
        split_of = dict(zip(table.tasks, table.splits, strict=True))
        return {split: tuple(task for task in usable if split_of[task] == split) for split in SPLITS}
    order = shuffled(len(usable), seed, "class split").tolist()
    shares = [float(part) for part in fractions.split("-")]
    ends = np.round(np.cumsum(shares) / sum(shares) * len(usable)).astype(int).tolist()
    starts = [0, *ends[:-1]]
    return {
        split: tuple(usable[place] for place in sorted(order[start:end]))
        for split, start, end in zip(SPLITS, starts, ends, strict=True)
    }


def without_repeats(words_TE: NDArray[np.uint64], counts_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn random words into different numbers below the count of each row.

    The words of small and large counts are equally many, unlike the keys of `k_smallest`. The j-th word of a
    row chooses uniformly among the numbers that are left, up to a bias of the count divided by 2^64.
    """
    numbers_TE = np.empty(words_TE.shape, dtype=np.int64)
    for j in range(words_TE.shape[1]):
        place_T = (words_TE[:, j] % (counts_T - j).astype(np.uint64)).astype(np.int64)
        # With taken numbers t_0 < t_1 < ..., number r of those that are left is r + #{i: t_i - i <= r}.
        taken_TJ = np.sort(numbers_TE[:, :j], axis=1) - np.arange(j)
        numbers_TE[:, j] = place_T + (taken_TJ <= place_T[:, None]).sum(1)
    return numbers_TE


@dataclass(frozen=True)
class TableFacts:
    """What a run stores about the table on which it is trained."""

    standardisation: Standardisation
    tasks: Mapping[str, Sequence[str]]  # split -> the names of its tasks


class TableStream:
    """All draws from the tasks of a split; draw i does not depend on the run or the order of calls.

    Streams that differ only in queries share the tasks and their support sets.
    """

    ways = 1  # there are no classes

    def __init__(
        self,
        table: TaskTable,
        names: Sequence[str],
        standardisation: Standardisation,
        settings: StreamSettings,
    ) -> None:
        """Put the standardised rows of a split on the device.

        Args:
            table: all tasks.
            names: the tasks of the split, each with enough rows.
            standardisation: of the training tasks.
            settings: the split, the size of its tasks, the seed and the device.
        """
        self.split, self.seed = settings.split, settings.seed
        self.shots, self.queries = settings.shots, settings.queries
        self.device = settings.place.device
        self.names, self.standardisation, self.table = tuple(names), standardisation, table
        place_of = {name: place for place, name in enumerate(table.tasks)}
        task_S = np.array([place_of[name] for name in names])
        self._counts, self._starts = table.counts[task_S], table.starts[task_S]
        scaled_MC = torch.from_numpy(standardisation.apply(table.values_MC)).to(settings.place.dtype)
        x_MD, y_MN = torch.tensor_split(scaled_MC, [len(standardisation.inputs)], dim=1)
        self._first, self._ahead_TE = 0, np.empty((0, self.shots + self.queries), dtype=np.int64)
        self._x_MD, self._y_MN = x_MD.contiguous().to(self.device), y_MN.contiguous().to(self.device)

    def tasks_of(self, first: int, draws: int) -> NDArray[np.int64]:
        """Which task of the split each draw takes, _T."""
        tasks = len(self.names)
        passes = range(first // tasks, (first + draws - 1) // tasks + 1)
        orders = [
            k_smallest(random_words(self.seed, f"{self.split} passes", number, tasks), tasks)
            for number in passes
        ]
        start = first - passes[0] * tasks
        return np.concatenate(orders)[start : start + draws]

    def rows_of(self, first: int, draws: int) -> NDArray[np.int64]:
        """The rows of the table in each draw, _TE: those of the support set, then those of the query set."""
        start = first - self._first
        if start < 0 or start + draws > len(self._ahead_TE):
            ahead = max(draws, DRAWN // (self.shots + self.queries))
            self._first, self._ahead_TE, start = first, self._draw(first, ahead), 0
        return self._ahead_TE[start : start + draws]

    def _draw(self, first: int, draws: int) -> NDArray[np.int64]:
        task_T = self.tasks_of(first, draws)
        words_TE = random_word_rows(self.seed, self.split, first, draws, self.shots + self.queries)
        start_T1: NDArray[np.int64] = self._starts[task_T][:, None]
        return start_T1 + without_repeats(words_TE, self._counts[task_T])

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return draws `first`, `first` + 1, ... without a host sync: x _TED, y _TEN, both standardised."""
        row_TE = self.rows_of(first, tasks)
        at_M = to_device_no_sync(torch.from_numpy(row_TE.ravel()), self.device)
        x_TED, y_TEN = (
            part.index_select(0, at_M).view(*row_TE.shape, part.shape[1]) for part in (self._x_MD, self._y_MN)
        )
        cut = self.shots
        sets = x_TED[:, :cut], y_TEN[:, :cut], x_TED[:, cut:], y_TEN[:, cut:]
        return Episodes(*(part.contiguous() for part in sets))

    def different(self, draws: int) -> int:
        """How many different tasks the first draws take."""
        return min(draws, len(self.names))


def table_stream(stream: Tasks) -> TableStream | None:
    """The stream of a table's tasks, also inside one of mini-batches; None for other data."""
    inner = stream.stream if isinstance(stream, MiniBatches) else stream
    return inner if isinstance(inner, TableStream) else None


def different_tasks(stream: Tasks, draws: int) -> int:
    """How many different tasks the first draws of a stream take; all of them except from a table."""
    table = table_stream(stream)
    return draws if table is None else table.different(draws)
