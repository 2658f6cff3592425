"""What commands return: plain records, never tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mamlctl.core.events import ValidationDone
from mamlctl.core.literals import BatchNormMode, Metric, Model, Split, StopReason

TIMED = 3  # meta-steps of each kind that an estimate measures


@dataclass(frozen=True)
class RowEstimate:
    """What one cell of a row takes, in seconds."""

    row: str
    meta_steps: int
    step_s: float  # mean over the run's phases
    train_s: float  # validation included
    test_s: float


@dataclass(frozen=True)
class Estimate:
    """The time that a whole grid takes with all workers, without the start of its processes."""

    rows: tuple[RowEstimate, ...]
    cells: int
    meta_steps: int
    seconds: float
    workers: int
    device: str
    timed: int = TIMED


@dataclass(frozen=True)
class TrainResult:
    """How a training ended."""

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


@dataclass(frozen=True)
class EvalRow:
    """One model, or one ensemble, on one list of tasks."""

    model: str  # "best", "last" or "ensemble-<k>"
    kind: Model
    metric: Metric  # of the score: an accuracy is 0..1
    score: float
    ci95: float  # half width over tasks
    tasks: int
    split: Split
    ways: int
    shots: int
    queries: int
    inner_steps: int
    bn: BatchNormMode
    epochs: tuple[int, ...]  # the epoch of every checkpoint used
    per_step: tuple[float, ...]  # score after 0, 1 ... inner_steps
    per_step_ci95: tuple[float, ...]


@dataclass(frozen=True)
class EvalResult:
    """The results of `eval`, and where they were written."""

    run: str
    dataset: str
    algo: str
    folder: str
    seconds: float
    rows: tuple[EvalRow, ...]
    pictures: tuple[str, ...] = ()  # files
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know


@dataclass(frozen=True)
class ClassifiedImage:
    """One of the user's own images, and the class that an adapted model predicts."""

    file: str
    predicted: str | None = None  # None where the file cannot be read
    probabilities: tuple[float, ...] = ()  # of every class
    label: str | None = None  # what its folder says
    problem: str = ""

    @property
    def probability(self) -> float | None:
        """Of the predicted class."""
        return max(self.probabilities, default=None)


@dataclass(frozen=True)
class ClassifyResult:
    """The user's own images with their predicted classes, and the files that were written."""

    run: str
    algo: str
    model: str  # "best, epoch 7" or "last"
    classes: tuple[str, ...]
    shots: tuple[int, ...]  # support images of each class
    head: str  # what tells the classes apart
    inner_steps: int
    bn: BatchNormMode
    images: tuple[ClassifiedImage, ...]
    left_out: int  # support images that cannot be read
    seconds: float
    pictures: tuple[str, ...] = ()
    csv: str | None = None
    saved: str | None = None

    @property
    def labelled(self) -> int:
        """Images that could be read and whose class is known."""
        return sum(image.label is not None and image.predicted is not None for image in self.images)

    @property
    def right(self) -> int:
        """How many of those are predicted correctly."""
        return sum(image.label is not None and image.predicted == image.label for image in self.images)

    @property
    def unreadable(self) -> int:
        """Query images that cannot be read."""
        return sum(image.predicted is None for image in self.images)


def named(record: ValidationDone | TrainResult | EvalRow) -> dict[str, Any]:
    """A record as files and documents have it: its score under the name of its metric."""
    return {
        key.replace("score", record.metric): value for key, value in asdict(record).items() if key != "metric"
    }
