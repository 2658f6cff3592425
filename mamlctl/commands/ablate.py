"""`ablate`: a grid of trainings brought to its end, cell by cell, and its table."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamlctl import words
from mamlctl.commands.data import complete, open_streams
from mamlctl.commands.grid import CELLS, Grid, GridCell, save_plan, working_on
from mamlctl.commands.jobs import Ended, Executor, Job
from mamlctl.commands.judged import test_problems
from mamlctl.commands.results import find_test
from mamlctl.commands.spelling import cell_test, settings_arguments, train_arguments
from mamlctl.commands.stopping import StopRequests
from mamlctl.commands.tabulate import Source, Wanted, tabulate
from mamlctl.comparisons import Table
from mamlctl.data.sets import is_curves
from mamlctl.engine.build import build
from mamlctl.errors import DataError, ExitCode, SettingsError
from mamlctl.records import OVER, CellState, GridChanged, Notice, OnEvent
from mamlctl.report.files import write_files
from mamlctl.runs import CONFIG, METRICS, MOVABLE, RunFolder, is_locked, open_run, status_of

POLL_S = 0.25  # how often jobs are looked after: below what a person notices
TAIL = 20_000  # bytes at the end of metrics.jsonl that hold its last entry


@dataclass(frozen=True)
class GridResult:
    """How far a grid has come, and its table."""

    folder: Path
    table: Table
    reason: str  # why it stopped before its end; "" if it did not
    failed: Mapping[str, str]  # cells whose commands failed -> what they said last
    left: int  # cells that are not done
    files: tuple[Path, ...]


def check_data(grid: Grid, *, offline: bool, on_event: OnEvent) -> None:
    """Fetch and open what the cells will need and build their networks, so that what fails does so once.

    Raises SettingsError for tasks that a split is too small for or images that a network cannot take,
    DataError for missing or damaged data.
    """
    evaluate, configs = grid.evaluate, [complete(row.config) for row in grid.rows]
    if problems := [problem for config in configs for problem in test_problems(config, evaluate)]:
        raise SettingsError(list(dict.fromkeys(problems)))
    cpu = torch.device("cpu")
    _, source = open_streams(configs[0], ("train", "val"), cpu, offline=offline, on_event=on_event)
    open_streams(
        configs[0],
        (evaluate.split,),
        cpu,
        offline=offline,
        on_event=on_event,
        disjoint=evaluate.disjoint,
    )
    for config in configs:
        build(config, source.example_shape, torch.device("meta"), classes=source.classes.get("train"))
    for cell in grid.cells:
        known = RunFolder(cell.folder, cell.config).environment().get("dataset_digest", source.digest)
        if known != source.digest:
            here = f"{configs[0].dataset} has digest {source.digest:.12}"
            fact = f"{here}, but {cell.folder} was trained on {known:.12}"
            raise DataError(fact, hint="choose another --out: rows of one table see the same images")


def ablate(
    grid: Grid,
    executor: AbstractContextManager[Executor],
    *,
    time_limit_s: float | None,
    on_event: OnEvent,
    offline: bool = False,
) -> GridResult:
    """Train and test whatever of the grid is missing, then make its table and its files.

    Raises MamlctlError if another process fills the grid, or for a damaged cell.
    """
    started = time.monotonic()
    with working_on(grid):
        save_plan(grid)
        waiting = [cell.name for cell in grid.cells if _is_left(cell, grid)]
        if grid.left_out:
            told = ", ".join(grid.left_out)
            on_event(Notice(f"left out or renamed, since an improvement means nothing there: {told}"))
        reason, ended = "", dict[str, Ended]()
        if waiting:
            on_event(Notice(f"into {grid.folder}"))
            limited = StopRequests(on_event, time_limit_s=time_limit_s, started=started)
            with limited as stop, executor as running:
                filling = _Filling(grid, waiting, running, stop, on_event, offline)
                reason, ended = filling.run(), filling.ended
        failed = {name: _why(end) for name, end in ended.items() if _failed(end)}
        table = grid_table(grid, failed)
        left = sum(_is_left(cell, grid) for cell in grid.cells)
        files = write_files(table, grid.folder)
    return GridResult(grid.folder, table, reason, failed, left, tuple(files))


def grid_table(grid: Grid, failed: Mapping[str, str]) -> Table:
    """The table of what the grid's folder holds now."""
    rows = [
        Wanted(
            row.label,
            row.config,
            tuple(
                Source(cell.seed, cell.folder, shlex.join(_train_line(cell)), failed.get(cell.name, ""))
                for cell in grid.cells
                if cell.row == row
            ),
        )
        for row in grid.rows
    ]
    return tabulate(grid.plan, rows, grid.evaluate, root=grid.folder, commands=[grid.command])


def _train_line(cell: GridCell) -> list[str]:
    return ["mamlctl", "train", *train_arguments(cell.config), "--out", f"{CELLS}/{cell.name}"]


def _is_left(cell: GridCell, grid: Grid) -> bool:
    """Whether there is anything to do for a cell that would help; what has diverged does so again."""
    status = status_of(cell.folder)
    if status != "finished":
        return status != "diverged"
    return find_test(RunFolder(cell.folder, cell.config), grid.evaluate) is None


def anything_left(grid: Grid) -> bool:
    """Whether any cell is to be trained or tested."""
    return any(_is_left(cell, grid) for cell in grid.cells)


def _job(cell: GridCell, grid: Grid, offline: bool) -> Job | None:
    """What is left to do for a cell; None when nothing is."""
    if not _is_left(cell, grid):
        return None
    moved: tuple[str, ...] = ()
    if (cell.folder / CONFIG).is_file():
        there = open_run(cell.folder).config
        changed = {name: getattr(cell.config, name) for name in MOVABLE}
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


class _Filling:
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
        first = complete(grid.rows[0].config)
        self._title = f"{words.task(first.dataset, first.ways, first.shots)}, {grid.plan}"
        self._metric = "mse" if is_curves(first.dataset) else "accuracy"
        self._cells = {cell.name: cell for cell in grid.cells}
        self._states = {name: self._state(cell) for name, cell in self._cells.items()}
        self._first_steps = sum(state.step for state in self._states.values())

    def run(self) -> str:
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
        status, (step, score) = status_of(cell.folder), _progress(cell.folder)
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
    test = find_test(RunFolder(cell.folder, cell.config), grid.evaluate)
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


@contextmanager
def local_executor(grid: Grid, workers: int) -> Iterator[Executor]:
    """Workers on this machine, each with a CUDA device where there are some."""
    from mamlctl.commands.local import LocalExecutor

    executor = LocalExecutor(workers, grid.folder / "logs", cuda_devices=_cuda_devices(grid))
    try:
        yield executor
    finally:
        executor.stop(signal.SIGTERM)  # what still runs after an error would train on


def workers_here(grid: Grid, workers: int | None) -> int:
    """As asked for; else one for each CUDA device that cells may take; on a CPU one, with all threads."""
    return max(len(_cuda_devices(grid)), 1) if workers is None else workers


def _cuda_devices(grid: Grid) -> list[str]:
    """Devices to share out; none where cells name their own, or the CPU."""
    from mamlctl.commands.local import visible_cuda_devices

    wants = {row.config.device for row in grid.rows}
    return visible_cuda_devices() if wants <= {"auto", "cuda"} else []
