"""The jobs of a grid: started, watched and reported until every cell is done."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.errors import ExitCode
from mamlctl.core.events import OVER, CellState, GridChanged, Notice, OnEvent
from mamlctl.core.files import is_locked
from mamlctl.core.literals import StopReason
from mamlctl.data.sets.registry import is_curve_family
from mamlctl.experiments.executors.jobs import Ended, Executor, Job
from mamlctl.experiments.grid.command_lines import cell_test, settings_arguments, train_arguments
from mamlctl.experiments.grid.grid import Grid, GridCell
from mamlctl.experiments.grid.stored_evaluations import find_evaluation
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.experiments.settings import fill_defaults
from mamlctl.run_folder import CONFIG, METRICS, RESUME_OVERRIDES, RunFolder, open_run, run_state

POLL_S = 0.25  # how often jobs are looked after: below what a person notices

TAIL = 20_000  # bytes at the end of metrics.jsonl that hold its last entry


def _is_left(cell: GridCell, grid: Grid) -> bool:
    """Whether there is anything to do for a cell that would help; what has diverged does so again."""
    status = run_state(cell.folder).status
    if status != "finished":
        return status != "diverged"
    return find_evaluation(RunFolder(cell.folder, cell.config), grid.evaluate) is None


def has_pending_cells(grid: Grid) -> bool:
    """Whether any cell is to be trained or tested."""
    return any(_is_left(cell, grid) for cell in grid.cells)


def _job(cell: GridCell, grid: Grid, offline: bool) -> Job | None:
    """What is left to do for a cell; None when nothing is."""
    if not _is_left(cell, grid):
        return None
    moved: tuple[str, ...] = ()
    if (cell.folder / CONFIG).is_file():
        there = open_run(cell.folder).config
        changed = {name: getattr(cell.config, name) for name in RESUME_OVERRIDES}
        moved = settings_arguments(
            {name: value for name, value in changed.items() if value != getattr(there, name)}
        )
    offline_too = ("--offline",) if offline else ()
    return Job(
        cell.name,
        cell.folder,
        (*train_arguments(cell.config), *offline_too),
        (*cell_test(cell, grid.evaluate), "--quiet", *offline_too),
        (*moved, *offline_too),
    )


def _failed(end: Ended) -> bool:
    """Whether a job left its cell undone for a reason of its own."""
    stopped = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
    return end.code not in (ExitCode.OK, ExitCode.DIVERGED, *stopped)


def _why(end: Ended) -> str:
    """The error that a job's command printed; the signal that killed it."""
    if end.code == -signal.SIGKILL:
        return "killed by SIGKILL: out of memory?"
    if end.code < 0:
        return f"killed by signal {-end.code}"
    said = end.said.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else (said or [f"exit code {end.code}"])[-1].strip()


class Scheduler:
    """Jobs under way, and what is told about them."""

    def __init__(
        self,
        grid: Grid,
        waiting: Sequence[str],
        executor: Executor,
        stop: StopRequests,
        on_event: OnEvent,
        offline: bool,
    ) -> None:
        self.ended: dict[str, Ended] = {}
        self._grid, self._executor, self._stop, self._on_event = grid, executor, stop, on_event
        self._waiting, self._offline = list(waiting), offline
        self._running: set[str] = set()
        self._elsewhere: set[str] = set()
        self._began = time.monotonic()
        first = fill_defaults(grid.rows[0].config)
        self._title = f"{formatting.task(first.dataset, first.ways, first.shots)}, {grid.plan}"
        self._metric = "mse" if is_curve_family(first.dataset) else "accuracy"
        self._cells = {cell.name: cell for cell in grid.cells}
        self._states = {name: self._state(cell) for name, cell in self._cells.items()}
        self._first_steps = sum(state.step for state in self._states.values())

    def run(self) -> StopReason:
        """Until every job has ended, or a reason to stop before."""
        while self._waiting or self._running:
            if reason := self._stop.reason():
                self._executor.stop(signal.SIGINT if reason == "SIGINT" else signal.SIGTERM)
                return reason
            for end in self._executor.ended():
                self._note_end(end)
            self._start_some()
            self._tell()
            time.sleep(POLL_S)
        self._tell()
        return ""

    def _start_some(self) -> None:
        for name in list(self._waiting):
            if len(self._running) >= self._executor.slots:
                return
            if is_locked(self._cells[name].folder):
                # Trained by somebody else, such as a queue's job, or by what a killed call left for a moment.
                if name not in self._elsewhere:
                    self._elsewhere.add(name)
                    self._on_event(Notice(f"{name} is in use by another process: waiting for it"))
                continue
            self._elsewhere.discard(name)
            self._waiting.remove(name)
            # Asked anew: somebody else may have done some of it meanwhile, or all.
            job = _job(self._cells[name], self._grid, self._offline)
            if job is None:
                self._states[name] = self._state(self._cells[name])
                continue
            self._running.add(name)
            self._executor.start(job)

    def _note_end(self, end: Ended) -> None:
        self._running.remove(end.name)
        if "is in use by" in end.said and _failed(end):  # somebody was quicker
            self._waiting.append(end.name)
            return
        self.ended[end.name] = end
        self._states[end.name] = self._state(self._cells[end.name])
        if _failed(end):
            self._on_event(Notice(f"{end.name} failed: {_why(end)}"))

    def _tell(self) -> None:
        for name in (*self._running, *self._elsewhere):
            self._states[name] = self._state(self._cells[name])
        states = tuple(self._states.values())
        told = GridChanged(
            self._title, self._metric, self._executor.slots, states, self._seconds_left(states)
        )
        self._on_event(told)

    def _seconds_left(self, states: Sequence[CellState]) -> float | None:
        """From the meta-steps done since this call began, or where there are only tests left, from those."""
        if all(state.step == state.total_steps for state in states if state.state not in OVER):
            left = sum(state.state not in OVER for state in states)
            return (time.monotonic() - self._began) * left / len(self.ended) if self.ended else None
        steps = sum(state.step for state in states) - self._first_steps
        left = sum(state.total_steps - state.step for state in states if state.state not in OVER)
        return None if steps <= 0 else (time.monotonic() - self._began) * left / steps

    def _state(self, cell: GridCell) -> CellState:
        config = cell.config
        status, (step, score) = run_state(cell.folder).status, _progress(cell.folder)
        if status == "diverged":
            state = "diverged"
        elif status == "finished":
            step = config.total_steps
            test = None if cell.name in self._running else _tested_score(cell, self._grid)
            state, score = ("testing", score) if test is None else ("done", test)
        else:
            state = "training"
        if state in ("training", "testing") and cell.name not in self._running:
            state = "elsewhere" if cell.name in self._elsewhere else "waiting"
            if cell.name in self.ended and _failed(self.ended[cell.name]):
                state = "failed"
        return CellState(cell.row.label, cell.seed, state, step, config.total_steps, score)


def _tested_score(cell: GridCell, grid: Grid) -> float | None:
    test = find_evaluation(RunFolder(cell.folder, cell.config), grid.evaluate)
    return None if test is None else float(test.scores["best"].mean())


def _progress(folder: Path) -> tuple[int, float | None]:
    """Meta-steps done and the last validation's score, from the end of metrics.jsonl."""
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return 0, None
    step, score = 0, None
    for entry in _entries(lines):
        step = int(entry.get("step", step))
        score = entry.get("val_accuracy", entry.get("val_mse", score))
    return step, score


def _entries(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the first may begin in its middle, the last may not be whole yet
            continue
        if isinstance(entry, dict):
            yield entry
