"""What travels up from the engine to whoever shows or stores it: plain numbers, never tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Notice:
    """One line worth telling, such as a data set being fetched."""

    text: str


@dataclass(frozen=True)
class Progress:
    """A long piece of work outside training: `done` of `total` things, such as images or tasks."""

    what: str
    done: int
    total: int  # 0 where nobody knows
    unit: str = ""  # "B" where bytes are counted
    per_second: float | None = None  # None: as fast as it went so far


@dataclass(frozen=True)
class RunStarted:
    """Everything a display wants to know before the first meta-step."""

    run: str
    dataset: str
    algo: str
    improvements: tuple[str, ...]  # the MAML++ letters that are on, in the paper's order
    ways: int
    shots: int
    queries: int
    meta_batch_size: int
    inner_steps: int
    epochs: int
    steps_per_epoch: int
    first_step: int  # meta-steps done before this start; 0 unless resumed
    parameters: int  # meta-learnt numbers, all kinds
    metric: str  # accuracy, or mse for curves
    guesses: int  # classes that training tells apart: a guess is right once in so many; 0 for curves
    device: str
    bn: str
    val_tasks: int


@dataclass(frozen=True)
class MetaStepDone:
    """A meta-step was launched; carries no measurement, so that it costs no host sync."""

    step: int  # counted from 1
    epoch: int  # counted from 0


@dataclass(frozen=True)
class TrainReport:
    """Means over the meta-steps since the last report, over tasks.

    Without MSL the query losses after fewer than all inner steps are measured on the report's own
    meta-step only, since training does not need them.
    """

    step: int
    epoch: int
    support_loss: float | None  # mean over the inner steps, before each; None where there are none
    query_losses: tuple[float, ...]  # index = inner steps taken; [0] is before adaptation
    query_accuracies: tuple[float, ...]  # 0..1, same index; empty for curves
    query_accuracy: float | None  # after the last inner step, 0..1; None for curves
    meta_loss: float
    msl_weights: tuple[float, ...]  # weight of the query loss after inner step 1..I
    meta_lr: float
    first_order: bool | None  # None where nothing is unrolled
    tasks_per_second: float
    memory_bytes: int  # peak on the CUDA device; resident set of the process on a CPU
    rates: Mapping[
        str, tuple[float, ...]
    ]  # inner learning rates: tensor -> one per inner step; empty if fixed


@dataclass(frozen=True)
class ValidationDone:
    """Score on the fixed validation tasks after an epoch."""

    step: int
    epoch: int  # epochs completed, counted from 1
    metric: str  # accuracy (0..1) or mse
    val_score: float
    val_ci95: float
    val_per_step: tuple[float, ...]
    val_tasks: int
    bn: str
    best_val_score: float
    best_val_ci95: float
    best_epoch: int


OVER = ("done", "diverged", "failed")  # states of a cell that nothing more is done for


@dataclass(frozen=True)
class CellState:
    """How a cell of a grid stands."""

    row: str
    seed: int
    state: str  # waiting, elsewhere, training, testing, done, diverged, failed
    step: int  # meta-steps done
    total_steps: int
    score: float | None = None  # of the test; of the last validation while training


@dataclass(frozen=True)
class GridChanged:
    """All cells of a grid, row by row and the seeds of each in order."""

    title: str
    metric: str  # accuracy, or mse
    workers: int  # cells at a time
    cells: tuple[CellState, ...]
    seconds_left: float | None  # None while nobody knows


Event = Notice | Progress | RunStarted | MetaStepDone | TrainReport | ValidationDone | GridChanged
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class TrainResult:
    """How a training ended."""

    run: str
    status: str  # finished | interrupted
    reason: str  # "", "time limit", "SIGINT", "SIGTERM"
    step: int
    total_steps: int
    metric: str
    best_val_score: float | None
    best_val_ci95: float | None
    best_epoch: int | None
    val_tasks: int
    bn: str
    seconds: float


@dataclass(frozen=True)
class EvalRow:
    """One model, or one ensemble, on one list of tasks."""

    model: str  # "best", "last" or "ensemble-<k>"
    metric: str  # accuracy (0..1) or mse
    score: float
    ci95: float  # half width over tasks
    tasks: int
    split: str
    ways: int
    shots: int
    queries: int
    inner_steps: int
    bn: str
    epochs: tuple[int, ...]  # the epoch of every checkpoint used
    per_step: tuple[float, ...]  # score after 0, 1 ... inner_steps
    per_step_ci95: tuple[float, ...]


@dataclass(frozen=True)
class EvalResult:
    """What `eval` found, and where it wrote it."""

    run: str
    dataset: str
    algo: str
    folder: str
    seconds: float
    rows: tuple[EvalRow, ...]
    pictures: tuple[str, ...] = ()  # files, where some were asked for
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know


@dataclass(frozen=True)
class OwnImage:
    """One of the user's own images, as an adapted model takes it."""

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
class OwnResult:
    """The user's own images told apart, and what was written on the way."""

    run: str
    algo: str
    model: str  # "best, epoch 7" or "last"
    classes: tuple[str, ...]
    shots: tuple[int, ...]  # support images of each class
    head: str  # what tells the classes apart
    inner_steps: int
    bn: str
    images: tuple[OwnImage, ...]
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
        """How many of those are told right."""
        return sum(image.label is not None and image.predicted == image.label for image in self.images)

    @property
    def unreadable(self) -> int:
        """Images to be told apart that cannot be read."""
        return sum(image.predicted is None for image in self.images)


def named(record: ValidationDone | TrainResult | EvalRow) -> dict[str, Any]:
    """A record as files and documents have it: its score under the name of its metric."""
    return {
        key.replace("score", record.metric): value for key, value in asdict(record).items() if key != "metric"
    }
