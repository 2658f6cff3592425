"""The data of a table of runs: rows of cells, their scores, and their differences from the baseline.

Scores are in the metric's own unit: accuracies 0..1, mean squared errors unscaled.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mamlctl.core.literals import BatchNormMode, CellStatus, Metric, Model, Split

if TYPE_CHECKING:
    from mamlctl.core.statistics import Difference

SIGNIFICANT = 0.05  # significance level of p after Holm's correction
MODELS: tuple[Model, ...] = ("best", "ensemble")  # never compared with each other


@dataclass(frozen=True)
class Published:
    """A number that a paper or a repository prints, and its provenance."""

    source: str  # "MAML++ (Antoniou et al. 2019)"
    row: str  # in the source's words
    metric: Metric  # of the score: an accuracy is 0..1
    score: float
    half_width: float | None  # what the source prints after ±, which is not always a 95 % interval
    verified: bool  # read in a transcription; False: quoted from memory, printed with a mark
    note: str = ""


@dataclass(frozen=True)
class Score:
    """The score of one model per seed, or of one ensemble per seed, on the same tasks."""

    mean: float  # over seeds and tasks
    ci95: float  # half width for new tasks, of the mean over seeds
    deviation: float | None  # standard deviation over seeds; None with one seed
    per_seed: tuple[float, ...]
    per_step: tuple[float, ...]  # after 0, 1 ... inner steps, mean over seeds; empty if not measured
    per_step_tasks: int  # the number of tasks, the first ones, behind `per_step`; the least over seeds
    difference: Difference | None  # from the baseline; None in its own row, or without shared seeds
    p_holm: float | None  # the difference's p, corrected across the rows of the table

    @property
    def is_significant(self) -> bool:
        """Whether the difference's corrected p is below 0.05."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Cell:
    """One training run of the table."""

    seed: int
    run: str  # its folder, relative to the table's folder
    status: CellStatus
    reason: str  # why it is not finished; "" if it is
    steps: int  # meta-steps done
    steps_to_99: int | None  # meta-steps until validation first reached 99 % of its final score
    step_s: float | None  # median seconds per meta-step
    validation: tuple[tuple[int, float], ...]  # meta-steps, score
    rates: Mapping[str, tuple[float, ...]]  # final learnt rates: tensor -> one per inner step; may be empty
    command: str  # that trains only this run
    device: str = ""  # the device it was trained on
    diverged_at: int | None = None  # the meta-step whose loss or gradient was not finite


def _median(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(statistics.median(numbers)) if numbers else None


@dataclass(frozen=True)
class Row:
    """All seeds of one set of settings."""

    label: str  # "maml + msl"
    settings: Mapping[str, Any]  # those that distinguish this row
    cells: tuple[Cell, ...]
    best: Score | None  # None while no cell has been tested
    ensemble: Score | None
    ensemble_size: int  # checkpoints in it; the minimum over the row's cells
    published: tuple[Published, ...]
    bn: BatchNormMode
    inner_steps: int
    added: tuple[str, ...] = ()  # improvements that the label adds to the baseline
    removed: tuple[str, ...] = ()  # improvements that the label removes from it

    @property
    def short_label(self) -> str:
        """The label relative to the baseline, "+ msl"; the whole label if it differs in other ways."""
        changes = [*(f"+ {name}" for name in self.added), *(f"- {name}" for name in self.removed)]
        return " ".join(changes) or self.label

    @property
    def steps_to_99(self) -> float | None:
        """Median over the seeds that have it."""
        return _median([cell.steps_to_99 for cell in self.cells])

    @property
    def step_s(self) -> float | None:
        """Median over the seeds that have it."""
        return _median([cell.step_s for cell in self.cells])

    @property
    def divergences(self) -> int:
        """Cells whose training diverged."""
        return sum(cell.status == "diverged" for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """An ablation or a comparison, with all rows tested on the same tasks."""

    title: str  # "omniglot 5-way 1-shot, one-on"
    dataset: str
    ways: int
    shots: int
    queries: int
    metric: Metric
    split: Split
    tasks: int
    eval_seed: int
    disjoint: bool
    label_permutations: int
    baseline: str  # label of the row that the others are compared with
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]  # those that all rows share
    environment: Mapping[str, Any]  # versions and machine of the first cell
    commands: tuple[str, ...]  # that reproduce this table
    notes: tuple[str, ...] = field(default=())  # caveats about the numbers

    @property
    def baseline_row(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.label == self.baseline)

    @property
    def most_seeds(self) -> int:
        """The number of seeds of the row that was tested with the most."""
        return max((len(row.best.per_seed) for row in self.rows if row.best), default=0)

    @property
    def per_step_words(self) -> str:
        """Which tasks were scored after every inner step, for a title; "" for all of them."""
        counts = {row.best.per_step_tasks for row in self.rows if row.best and row.best.per_step}
        first = " or ".join(map(str, sorted(counts)))
        return "" if counts <= {self.tasks} else f", first {first} of {self.tasks} tasks"

    def setting(self, row: Row, name: str) -> Any:
        """The value of a setting in a row, whether all rows share it or not."""
        return {**self.settings, **row.settings}[name]
