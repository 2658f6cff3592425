"""What a table of runs holds: rows of cells, their scores, and how they differ from the baseline.

Scores are in the metric's own unit: accuracies 0..1, mean squared errors as they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mamlctl.core.literals import BatchNormMode, CellStatus, Metric, Model, Split

if TYPE_CHECKING:
    from mamlctl.core.statistics import Difference

SIGNIFICANT = 0.05  # of a p that Holm's correction has been through
MODELS: tuple[Model, ...] = ("best", "ensemble")  # never mixed


@dataclass(frozen=True)
class Published:
    """A number that a paper or a repository prints, and how it reached us."""

    source: str  # "MAML++ (Antoniou et al. 2019)"
    row: str  # in the source's words
    metric: Metric  # of the score: an accuracy is 0..1
    score: float
    half_width: float | None  # what the source prints after ±, which is not always a 95 % interval
    verified: bool  # read in a transcription; False: recalled, printed with a mark
    note: str = ""


@dataclass(frozen=True)
class Score:
    """One model of every seed, or one ensemble of every seed, on the same tasks."""

    mean: float  # over seeds and tasks
    ci95: float  # half width over tasks, of the seeds' mean
    deviation: float | None  # standard deviation over seeds; None of one seed
    per_seed: tuple[float, ...]
    per_step: tuple[float, ...]  # after 0, 1 ... inner steps, mean over seeds
    difference: Difference | None  # to the baseline; None in the baseline's own row, or without shared seeds
    p_holm: float | None  # the difference's p, corrected over the rows of the table

    @property
    def is_significant(self) -> bool:
        """Whether the difference's corrected p is below 0.05."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Cell:
    """One training run of the table."""

    seed: int
    run: str  # its folder, relative to the table's
    status: CellStatus
    reason: str  # why it is not finished; "" if it is
    steps: int  # meta-steps done
    steps_to_99: int | None  # meta-steps to the first validation at 99 % of the last one's score
    step_s: float | None  # median seconds per meta-step
    validation: tuple[tuple[int, float], ...]  # meta-steps, score
    rates: Mapping[str, tuple[float, ...]]  # last learnt inner rates: tensor -> one per inner step; or empty
    command: str  # that trains it alone
    device: str = ""  # what it was trained on
    diverged_at: int | None = None  # the meta-step whose loss or gradient was not finite


def _median(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(statistics.median(numbers)) if numbers else None


@dataclass(frozen=True)
class Row:
    """All seeds of one setting."""

    label: str  # "maml + msl"
    settings: Mapping[str, Any]  # what sets this row apart
    cells: tuple[Cell, ...]
    best: Score | None  # None while no cell has been tested
    ensemble: Score | None
    ensemble_size: int  # checkpoints in it; the least of the row's cells
    published: tuple[Published, ...]
    bn: BatchNormMode
    inner_steps: int
    added: tuple[str, ...] = ()  # improvements of which the label says that the baseline lacks them
    removed: tuple[str, ...] = ()  # and that the baseline has them

    @property
    def short_label(self) -> str:
        """What the label says beside the baseline's: "+ msl"; all of it where that is something else."""
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
    """An ablation or a comparison, all of it on the same test tasks."""

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
    baseline: str  # label of the row that differences are taken to
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]  # those that all rows share
    environment: Mapping[str, Any]  # versions and machine of the first cell
    commands: tuple[str, ...]  # that make this table again
    notes: tuple[str, ...] = field(default=())  # what a reader of the numbers must know

    @property
    def most_seeds(self) -> int:
        """Seeds of the row that has been tested with most of them."""
        return max((len(row.best.per_seed) for row in self.rows if row.best), default=0)
