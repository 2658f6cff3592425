"""The scheduler of a grid, which starts and watches jobs until every cell is done."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.errors import ExitCode
from mamlctl.core.events import CellState, GridChanged, Notice, OnEvent
from mamlctl.core.files import is_locked
from mamlctl.core.literals import CellProgress, StopReason
from mamlctl.core.metrics_rows import rows_of
from mamlctl.core.user_code.kinds import is_trusted, named_code
from mamlctl.data.rules import metric_of
from mamlctl.experiments.executors.jobs import Ended, Executor, Job
from mamlctl.experiments.grid.command_lines import cell_test, settings_arguments, train_arguments
from mamlctl.experiments.grid.grid import Grid, GridCell
from mamlctl.experiments.grid.stored_evaluations import StoredEvaluation, find_evaluation
from mamlctl.experiments.grid.time_left import CellTime, finished_time, running_time, seconds_left
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.experiments.settings import fill_defaults
from mamlctl.run_folder import CONFIG, RESUME_OVERRIDES, RunFolder, open_run, run_state
from mamlctl.settings.schema import FIELDS, TrainConfig

POLL_S = 0.25  # between polls of the jobs: too short for a person to notice


def is_pending(cell: GridCell, grid: Grid) -> bool:
    """Whether a cell has to be trained or tested."""
    state = run_state(cell.folder)
    return not state.ended or (state.status == "finished" and _evaluation(cell, grid) is None)


def pending_cells(grid: Grid) -> list[GridCell]:
    """The cells that have to be trained or tested."""
    return [cell for cell in grid.cells if is_pending(cell, grid)]


class Scheduler:
    """Starts jobs for the pending cells of a grid and reports the state of every cell."""

    def __init__(
        self,
        grid: Grid,
        pending: Sequence[GridCell],
        executor: Executor,
        stop: StopRequests,
        on_event: OnEvent,
        offline: bool,
    ) -> None:
        """A scheduler that has started no job yet.

        Args:
            grid: the grid.
            pending: the cells to train and test; all others are only reported.
            executor: runs the jobs.
            stop: requests to stop.
            on_event: receives a GridChanged after every poll, and notices.
            offline: never download.
        """
        self.ended: dict[str, Ended] = {}  # the last job of each cell, by the cell's name
        self._grid, self._executor, self._stop, self._on_event = grid, executor, stop, on_event
        self._waiting, self._offline = [cell.name for cell in pending], offline
        self._running: set[str] = set()
        self._elsewhere: set[str] = set()  # waiting cells that another process is training
        self._times: dict[tuple[str, int], CellTime] = {}  # what cells cost, by row and seed
        first = fill_defaults(grid.rows[0].config)
        self._title = f"{formatting.task(first.dataset, first.ways, first.shots)}, {grid.plan}"
        self._metric = metric_of(first)
        self._cells = {cell.name: cell for cell in grid.cells}
        self._states = {name: self._cell_state(cell) for name, cell in self._cells.items()}

    @property
    def failed(self) -> dict[str, str]:
        """Why jobs failed, by cell."""
        return {name: end.reason for name, end in self.ended.items() if end.failed}

    def run(self) -> StopReason:
        """Run until every job has ended and return "", or stop early and return the reason."""
        while self._waiting or self._running:
            if reason := self._stop.reason():
                self._executor.stop(signal.SIGINT if reason == "SIGINT" else signal.SIGTERM)
                return reason
            for end in self._executor.ended():
                self._record_end(end)
            self._start_jobs()
            self._report()
            time.sleep(POLL_S)
        self._report()
        return ""

    def _start_jobs(self) -> None:
        for name in list(self._waiting):
            if len(self._running) >= self._executor.slots:
                return
            cell = self._cells[name]
            if is_locked(cell.folder):
                # Used by another process, such as a job of a queue, or briefly by a child of a killed call.
                if name not in self._elsewhere:
                    self._elsewhere.add(name)
                    self._on_event(Notice(f"{name} is in use by another process: waiting for it"))
                continue
            self._elsewhere.discard(name)
            self._waiting.remove(name)
            # Another process may have trained or tested the cell in the meantime.
            if is_pending(cell, self._grid):
                self._running.add(name)
                self._executor.start(self._job(cell))
            else:
                self._states[name] = self._cell_state(cell)

    def _job(self, cell: GridCell) -> Job:
        """The job that completes a pending cell."""
        call = ("--offline",) if self._offline else ()
        overrides: tuple[str, ...] = ()
        if (cell.folder / CONFIG).is_file():
            overrides = settings_arguments(changes(open_run(cell.folder).config, cell.config))
        # The node of a cluster does not have this user's list of trusted code.
        trust = ("--trust-code",) if named_code(vars(cell.config)) and is_trusted(cell.folder) else ()
        return Job(
            cell.name,
            cell.folder,
            train=(*train_arguments(cell.config), *call),
            evaluate=(*cell_test(cell, self._grid.test), "--quiet", *call, *trust),
            overrides=(*overrides, *call, *trust),
        )

    def _record_end(self, end: Ended) -> None:
        self._running.remove(end.name)
        if end.code == ExitCode.LOCKED:  # another process took the cell first
            self._waiting.append(end.name)
            return
        self.ended[end.name] = end
        self._states[end.name] = self._cell_state(self._cells[end.name])
        if end.failed:
            self._on_event(Notice(f"{end.name} failed: {end.reason}"))

    def _report(self) -> None:
        for name in (*self._running, *self._elsewhere):
            self._states[name] = self._cell_state(self._cells[name])
        states = tuple(self._states.values())
        left_s = seconds_left(states, self._times, self._executor.slots)
        self._on_event(GridChanged(self._title, self._metric, self._executor.slots, states, left_s))

    def _cell_state(self, cell: GridCell) -> CellState:
        status, total = run_state(cell.folder).status, cell.config.total_steps
        run = RunFolder(cell.folder, cell.config)
        metrics = run.last_metrics()
        step = int(metrics[-1]["step"]) if metrics else 0
        known = running_time(run, metrics, self._grid.test)
        validations = rows_of(metrics, "validation")
        score = validations[-1].get(f"val_{self._metric}") if validations else None
        running = cell.name in self._running
        state: CellProgress = "training"
        if status == "diverged":
            state = "diverged"
        elif status == "finished":
            state, step = "testing", total
            evaluation = None if running else _evaluation(cell, self._grid)
            if evaluation is not None:
                state, score = "done", float(evaluation.scores["best"].mean())
                known = finished_time(run, metrics, evaluation)
        if state in ("training", "testing") and not running:
            state = "elsewhere" if cell.name in self._elsewhere else "waiting"
            if cell.name in self.failed:
                state = "failed"
        if known is not None:
            known = replace(known, earlier=state == "done" and cell.name not in self.ended)
            self._times[cell.row.label, cell.seed] = known
        losses = _losses(metrics) if state == "training" else []
        history = tuple(row[-1] for row in losses)
        return CellState(
            cell.row.label, cell.seed, state, step, total, score, losses[-1] if losses else (), history
        )


def _losses(metrics: Sequence[dict[str, Any]]) -> list[tuple[float, ...]]:
    """The query losses of the reports; null stands for one that was not finite."""
    rows = [row.get("query_losses") for row in rows_of(metrics, "report")]
    return [tuple(math.nan if loss is None else float(loss) for loss in row) for row in rows if row]


def changes(stored: TrainConfig, planned: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run takes from the plan.

    A run from before a setting existed keeps what older versions did, unless the plan has another value than
    the default.
    """
    changed = {}
    for name in RESUME_OVERRIDES:
        was, value, item = getattr(stored, name), getattr(planned, name), FIELDS[name]
        is_older = was == item.metadata["before"] and value == item.default
        if was != value and not is_older:
            changed[name] = value
    return changed


def _evaluation(cell: GridCell, grid: Grid) -> StoredEvaluation | None:
    return find_evaluation(RunFolder(cell.folder, cell.config), grid.test)
