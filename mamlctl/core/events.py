"""Events that the engine emits, for display or storage: plain numbers, never tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mamlctl.core.literals import BatchNormMode, CellProgress, Metric


@dataclass(frozen=True)
class Notice:
    """One line for the user, e.g. that a data set is being downloaded."""

    text: str


@dataclass(frozen=True)
class Waiting:
    """The command now waits for something before its work starts, e.g. for torch to be loaded."""

    what: str  # e.g. "loading torch"
    work: str = ""  # in the first event of a command: what it does

    @classmethod
    def for_data(cls, dataset: str) -> Waiting:
        """The event before a data set is opened; an image folder is shown by its name."""
        return cls(f"loading {Path(dataset).name}")


@dataclass(frozen=True)
class Progress:
    """Progress of long work outside training: `done` of `total` items, e.g. images or tasks."""

    what: str
    done: int
    total: int  # 0 if unknown
    unit: str = ""  # "B" for bytes
    per_second: float | None = None  # None: show the mean speed so far


@dataclass(frozen=True)
class RunStarted:
    """The facts about a run that a display shows before its first meta-step."""

    run: str
    dataset: str
    algo: str
    improvements: tuple[str, ...]  # the MAML++ improvements that are on, in the paper's order
    ways: int
    shots: int
    queries: int
    meta_batch_size: int
    inner_steps: int
    inner_lr: float  # the inner learning rate, from which learnt rates start
    epochs: int
    steps_per_epoch: int
    first_step: int  # meta-steps done before this start; 0 unless resumed
    parameters: int  # meta-learnt numbers of all kinds
    metric: Metric
    guesses: int  # classes of a training task, so the chance level is 1 / guesses; 0 for curves
    device: str
    bn: BatchNormMode
    val_tasks: int
    body_epochs: int  # the first epochs, in which the classes of a meta-batch are one problem
    loss: str = ""  # the name of a loss that is not the default

    def guesses_in(self, epoch: int) -> int:
        """The classes to guess among in the reports of an epoch, counted from 0; 0 for curves."""
        return self.guesses * (self.meta_batch_size if epoch < self.body_epochs else 1)

    def chance_loss(self, epoch: int) -> float | None:
        """The cross-entropy of guessing in the reports of an epoch; None for regression and other losses."""
        return math.log(self.guesses_in(epoch)) if self.guesses and not self.loss else None


@dataclass(frozen=True)
class MetaStepDone:
    """A meta-step was launched; it carries no measurement, which would cost a host sync.

    Where many meta-steps are one call (curves), their events come together after it.
    """

    step: int  # counted from 1
    epoch: int  # counted from 0


@dataclass(frozen=True)
class TrainReport:
    """Means over the tasks of all meta-steps since the last report.

    Without MSL, training does not need the query losses before the last inner step, so they are measured
    only on the meta-step of the report.
    """

    step: int
    epoch: int
    support_loss: float | None  # mean over inner steps of the loss before each; None without inner steps
    query_losses: tuple[float, ...]  # index = inner steps taken; [0] is before adaptation
    query_accuracies: tuple[float, ...]  # 0..1, same index; empty for curves
    query_accuracy: float | None  # after the last inner step, 0..1; None for curves
    meta_loss: float
    msl_weights: tuple[float, ...]  # weights of the query losses after inner steps 1..I
    meta_lr: float | None  # None for steps inside a trust region
    first_order: bool | None  # None if nothing is unrolled
    tasks_per_second: float
    memory_bytes: int  # peak memory of the CUDA device; on a CPU, resident set of the process
    # Learnt inner learning rates: tensor name -> one per inner step; empty if they are fixed.
    rates: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ValidationDone:
    """The score on the fixed validation tasks after an epoch."""

    step: int
    epoch: int  # epochs completed, counted from 1
    metric: Metric  # of all scores below; accuracies are 0..1
    val_score: float
    val_ci95: float
    val_tasks: int
    bn: BatchNormMode
    best_val_score: float
    best_val_ci95: float
    best_epoch: int


# The final states of a cell.
OVER: tuple[CellProgress, ...] = ("done", "diverged", "failed")


@dataclass(frozen=True)
class CellState:
    """The state of one cell of a grid."""

    row: str
    seed: int
    state: CellProgress
    step: int  # meta-steps done
    total_steps: int
    score: float | None = None  # test score; while training, the last validation score
    # Of the latest report; index = inner steps taken; empty unless the cell is running and has reported.
    query_losses: tuple[float, ...] = ()
    loss_history: tuple[float, ...] = ()  # the loss after the last inner step in the latest reports


@dataclass(frozen=True)
class GridChanged:
    """The state of all cells of a grid, ordered by row, then by seed."""

    title: str
    metric: Metric
    workers: int  # cells that run at once
    cells: tuple[CellState, ...]
    seconds_left: float | None  # None: not known yet


Event = Notice | Waiting | Progress | RunStarted | MetaStepDone | TrainReport | ValidationDone | GridChanged
OnEvent = Callable[[Event], None]
