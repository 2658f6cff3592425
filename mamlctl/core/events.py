"""What travels up from the engine to whoever shows or stores it: plain numbers, never tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mamlctl.core.literals import BatchNormMode, CellProgress, Metric


@dataclass(frozen=True)
class Notice:
    """One line for the user, such as that a data set is being fetched."""

    text: str


@dataclass(frozen=True)
class Progress:
    """A long piece of work outside training: `done` of `total` things, such as images or tasks."""

    what: str
    done: int
    total: int  # 0 if unknown
    unit: str = ""  # "B" for bytes
    per_second: float | None = None  # None: the mean speed so far


@dataclass(frozen=True)
class RunStarted:
    """What a display shows of a run before its first meta-step."""

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
    metric: Metric
    guesses: int  # classes in training: a guess is right with probability 1 / guesses; 0 for curves
    device: str
    bn: BatchNormMode
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
    # Inner learning rates: tensor -> one per inner step; empty if they are fixed.
    rates: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ValidationDone:
    """Score on the fixed validation tasks after an epoch."""

    step: int
    epoch: int  # epochs completed, counted from 1
    metric: Metric  # of the scores: an accuracy is 0..1
    val_score: float
    val_ci95: float
    val_per_step: tuple[float, ...]
    val_tasks: int
    bn: BatchNormMode
    best_val_score: float
    best_val_ci95: float
    best_epoch: int


# The states of a cell for which nothing more is done.
OVER: tuple[CellProgress, ...] = ("done", "diverged", "failed")


@dataclass(frozen=True)
class CellState:
    """How a cell of a grid stands."""

    row: str
    seed: int
    state: CellProgress
    step: int  # meta-steps done
    total_steps: int
    score: float | None = None  # of the test; of the last validation while training


@dataclass(frozen=True)
class GridChanged:
    """All cells of a grid, row by row and the seeds of each in order."""

    title: str
    metric: Metric
    workers: int  # cells at a time
    cells: tuple[CellState, ...]
    seconds_left: float | None  # None while unknown


Event = Notice | Progress | RunStarted | MetaStepDone | TrainReport | ValidationDone | GridChanged
OnEvent = Callable[[Event], None]
