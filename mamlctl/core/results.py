"""The results that commands return: plain records, never tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mamlctl.core.events import ValidationDone
from mamlctl.core.literals import BatchNormMode, ListedStatus, Metric, Model, Split, StopReason

# The number of best checkpoints to keep: the size of the ensemble in the published MAML++ code
# (experiment_builder.py, top_n_models=5).
KEPT = 5
TIMED = 3  # meta-steps of each kind that an estimate measures


@dataclass(frozen=True)
class RowEstimate:
    """The estimated time of one cell of a row, in seconds."""

    row: str
    meta_steps: int
    step_s: float  # mean over the run's phases
    train_s: float  # including validation
    test_s: float


@dataclass(frozen=True)
class Estimate:
    """The estimated time of a whole grid with all workers, excluding the start of its processes."""

    rows: tuple[RowEstimate, ...]
    cells: int
    meta_steps: int
    seconds: float
    workers: int
    device: str
    timed: int = TIMED


@dataclass(frozen=True)
class TrainResult:
    """The outcome of training."""

    run: str
    status: Literal["finished", "interrupted"]
    reason: StopReason
    step: int
    total_steps: int
    metric: Metric
    best_val_score: float | None
    best_val_ci95: float | None
    best_epoch: int | None
    val_tasks: int
    bn: BatchNormMode
    seconds: float
    chance: float | None = None  # accuracy of guessing; None for curves

    @property
    def includes_chance(self) -> bool:
        """Whether the interval of the best validation accuracy includes the accuracy of guessing."""
        if self.chance is None or self.best_val_score is None or self.best_val_ci95 is None:
            return False
        return abs(self.best_val_score - self.chance) <= self.best_val_ci95


@dataclass(frozen=True)
class EvalRow:
    """The scores of one model or one ensemble on one list of tasks."""

    model: str  # "best", "last" or "ensemble-<k>"
    kind: Model
    metric: Metric  # of the score; an accuracy is 0..1
    score: float
    ci95: float  # half width over tasks
    tasks: int
    split: Split
    ways: int
    shots: int
    queries: int
    inner_steps: int
    bn: BatchNormMode
    epochs: tuple[int, ...]  # of all checkpoints used
    # Scores after 0, 1, ..., inner_steps inner steps of the first `per_step_tasks` tasks; empty if that is 0.
    per_step: tuple[float, ...]
    per_step_ci95: tuple[float, ...]
    per_step_tasks: int


@dataclass(frozen=True)
class TargetError:
    """The error of one target of a table, in its own unit."""

    target: str
    mse: float
    ci95: float  # half width over tasks


@dataclass(frozen=True)
class TableScores:
    """What an evaluation on a table measured besides its scores."""

    tasks: int  # different ones; the intervals are over them
    errors: Mapping[str, tuple[TargetError, ...]]  # by model

    @property
    def standardised(self) -> bool:
        """Whether the scores are means over several targets, which are in units of their variances."""
        return any(len(errors) > 1 for errors in self.errors.values())


@dataclass(frozen=True)
class LossMeans:
    """The mean loss over the test tasks, for a loss that is not the default."""

    loss: str  # its name
    means: Mapping[str, tuple[float, float]]  # model -> mean, half width of the 95 % interval over tasks


@dataclass(frozen=True)
class EvalResult:
    """The results of `eval` and the folder where they are stored."""

    run: str
    dataset: str
    algo: str
    folder: str
    seconds: float
    rows: tuple[EvalRow, ...]
    pictures: tuple[str, ...] = ()  # files
    notes: tuple[str, ...] = ()  # caveats about the numbers
    table: TableScores | None = None  # of a run on a table
    loss: LossMeans | None = None  # of a run with a loss that is not the default


@dataclass(frozen=True)
class ClassifiedImage:
    """One of the user's own images, with the class predicted by an adapted model."""

    file: str
    predicted: str | None = None  # None if the file cannot be read
    probabilities: tuple[float, ...] = ()  # of each class
    label: str | None = None  # the name of the image's folder, if that is a class
    problem: str = ""

    @property
    def probability(self) -> float | None:
        """The probability of the predicted class."""
        return max(self.probabilities, default=None)


@dataclass(frozen=True)
class ExportedModel:
    """A file of `--export`, and how its predictions were checked."""

    file: str
    checked: int  # examples whose predictions were compared with those of `eval`
    # The largest difference: of probabilities, or of targets in their standard deviations in training.
    difference: float


@dataclass(frozen=True)
class ClassifyResult:
    """The user's own images with their predicted classes, and the output files."""

    run: str
    algo: str
    model: str  # "best, epoch 7" or "last"
    classes: tuple[str, ...]
    shots: tuple[int, ...]  # support images of each class
    head: str  # what classifies the images
    inner_steps: int
    bn: BatchNormMode
    images: tuple[ClassifiedImage, ...]
    left_out: int  # unreadable support images
    seconds: float
    pictures: tuple[str, ...] = ()
    csv: str | None = None
    saved: str | None = None
    exported: ExportedModel | None = None

    @property
    def labelled(self) -> int:
        """The number of readable query images with a known class."""
        return sum(image.label is not None and image.predicted is not None for image in self.images)

    @property
    def right(self) -> int:
        """The number of correct predictions among the labelled images."""
        return sum(image.label is not None and image.predicted == image.label for image in self.images)

    @property
    def unreadable(self) -> int:
        """The number of query images that cannot be read."""
        return sum(image.predicted is None for image in self.images)


@dataclass(frozen=True)
class TablePrediction:
    """The predictions for the rows of a query table, by a model that was adapted to a support table."""

    run: str
    algo: str
    model: str  # "best, epoch 7" or "last"
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    support_rows: int
    inner_steps: int
    x: tuple[tuple[float, ...], ...]  # in the units of the table, as all values
    predicted: tuple[tuple[float, ...], ...]
    truth: tuple[tuple[float, ...], ...] | None  # None if the query table has no targets
    seconds: float
    pictures: tuple[str, ...] = ()
    csv: str | None = None
    exported: ExportedModel | None = None

    @property
    def mse(self) -> tuple[float, ...] | None:
        """The mean squared error of each target over the rows; None without targets."""
        if self.truth is None:
            return None
        rows = list(zip(self.predicted, self.truth, strict=True))
        return tuple(
            math.fsum((ours[n] - true[n]) ** 2 for ours, true in rows) / len(rows)
            for n in range(len(self.targets))
        )


@dataclass(frozen=True)
class FetchedSet:
    """A data set that `fetch` has prepared."""

    name: str
    classes: int
    images: int
    digest: str
    folder: str  # the data root


@dataclass(frozen=True)
class ListedSet:
    """A data set in `fetch --list`."""

    name: str
    what: str
    download_bytes: int | None  # 0 if it is generated, None if it needs --from
    licence: str
    origin: str
    here: bool
    verified: str | None  # ISO time of the oldest verification of its packs
    damage: str | None
    folder: str  # the data root


@dataclass(frozen=True)
class VerifiedSet:
    """A data set that `fetch --verify` has checked."""

    name: str
    packs: int
    damage: str | None
    folder: str  # the data root


@dataclass(frozen=True)
class ListedRun:
    """A run in `compare --list`; what a damaged folder does not say is None."""

    run: str  # its folder
    status: ListedStatus
    changed: str  # ISO time of the last change of its files
    label: str | None = None  # its algorithm, and how its improvements differ from that
    dataset: str | None = None
    ways: int | None = None  # None for curves
    shots: int | None = None
    seed: int | None = None
    step: int | None = None  # meta-steps done
    total_steps: int | None = None
    metric: Metric | None = None
    best_val_score: float | None = None  # of the best epoch
    best_val_ci95: float | None = None
    reason: str = ""  # why it is not finished, or what is damaged


@dataclass(frozen=True)
class ListedTable:
    """A folder of a table in `compare --list`, with the runs that it has so far."""

    folder: str
    changed: str  # ISO time of its last change
    runs: int
    finished: int  # of these runs


@dataclass(frozen=True)
class RunList:
    """The runs and tables in the folder of runs, the newest ones first."""

    folder: str
    runs: tuple[ListedRun, ...]
    tables: tuple[ListedTable, ...]


def named(record: ValidationDone | TrainResult | EvalRow) -> dict[str, Any]:
    """A record as it is stored in files, with the name of its metric in place of "score" in each key."""
    return {
        key.replace("score", record.metric): value for key, value in asdict(record).items() if key != "metric"
    }
