"""Training and testing of all cells of a grid, and its table (`ablate`)."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Event, Notice, OnEvent, Waiting
from mamlctl.core.literals import StopReason
from mamlctl.core.user_code.kinds import check_same_code
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.run_code import Checked, new_code
from mamlctl.experiments.evaluation_settings import evaluation_problems
from mamlctl.experiments.executors.jobs import Executor
from mamlctl.experiments.executors.local import LocalExecutor, visible_cuda_devices
from mamlctl.experiments.grid.build_table import RowSpec, RunReference, tabulate
from mamlctl.experiments.grid.grid import Grid
from mamlctl.experiments.grid.grid_folder import lock_grid, save_plan
from mamlctl.experiments.grid.scheduler import Scheduler, pending_cells
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.experiments.runs.starts import check_starts
from mamlctl.experiments.settings import fill_defaults
from mamlctl.report.report_folder import write_files
from mamlctl.report.table import Table
from mamlctl.run_folder import RunFolder


@dataclass(frozen=True)
class GridResult:
    """The table of a grid, and what is missing from it."""

    folder: Path
    table: Table
    reason: StopReason
    failed: Mapping[str, str]  # why jobs failed, by cell
    left: int  # cells that are not done
    files: tuple[Path, ...]


def check_data(grid: Grid, *, offline: bool, on_event: OnEvent) -> None:
    """Open the data of all cells and build their networks, so that a problem is reported only once.

    Args:
        grid: the grid.
        offline: never download.
        on_event: receives progress and notices.

    Raises:
        SettingsError: a split is too small for the tasks, or a network cannot process the images.
        DataError: data are missing, damaged, or not those on which a cell was trained.
    """
    evaluate, configs = grid.evaluate, [fill_defaults(row.config) for row in grid.rows]
    if problems := [problem for config in configs for problem in evaluation_problems(config, evaluate)]:
        raise SettingsError(list(dict.fromkeys(problems)))
    open_splits = partial(
        open_streams,
        configs[0],
        place=Placement(torch.device("cpu")),
        offline=offline,
        on_event=on_event,
    )
    on_event(Waiting.for_data(configs[0].dataset))
    _, source = open_splits(splits=("train", "val"))
    open_splits(splits=(evaluate.split,), disjoint=evaluate.disjoint)
    shape, classes, codes = source.example_shape, source.classes.get("train"), {}
    known: Checked = {}
    notices = list[Event]()
    for row, config in zip(grid.rows, configs, strict=True):
        codes[row.label] = code = new_code(config, source, on_event, known=known)
        net, state = build(
            config, shape, torch.device("meta"), classes=classes, targets=source.targets, parts=code.parts
        )
        cells = [RunFolder(cell.folder, cell.config) for cell in grid.cells if cell.row == row]
        check_starts(cells, config, net, state, notices.append)
    for notice in dict.fromkeys(notices):
        on_event(notice)
    for cell in grid.cells:
        run = RunFolder(cell.folder, cell.config)
        check_same_code(run.path, codes[cell.row.label].stored)
        if not run.trained_on(source.digest, source.older_digests):
            current = f"{configs[0].dataset} has digest {source.digest:.12}"
            message = f"{current}, but {cell.folder} was trained on {run.dataset_digest:.12}"
            raise DataError(message, hint="choose another --out: all rows of a table need the same images")


def ablate(
    grid: Grid,
    executor: AbstractContextManager[Executor],
    *,
    time_limit_s: float | None,
    on_event: OnEvent,
    offline: bool = False,
) -> GridResult:
    """Train and test what is missing from a grid, then write its table.

    Args:
        grid: the grid.
        executor: entered only if cells are missing.
        time_limit_s: seconds until the runs save and stop; None for no limit.
        on_event: receives a GridChanged after every poll of the jobs, and notices.
        offline: never download.

    Raises:
        MamlctlError: another process is working on the grid, or a cell is damaged.
    """
    limited = StopRequests(on_event, time_limit_s=time_limit_s)
    with lock_grid(grid):
        save_plan(grid)
        pending = pending_cells(grid)
        if grid.left_out:
            labels = ", ".join(grid.left_out)
            on_event(Notice(f"left out or renamed, because an improvement has no effect there: {labels}"))
        reason: StopReason = ""
        failed: dict[str, str] = {}
        if pending:
            on_event(Notice(f"writing to {grid.folder}"))
            with limited as stop, executor as entered:
                scheduler = Scheduler(grid, pending, entered, stop, on_event, offline)
                reason, failed = scheduler.run(), scheduler.failed
        on_event(Waiting("writing the table"))
        table = grid_table(grid, failed)
        left = len(pending_cells(grid))
        files = write_files(table, grid.folder)
    return GridResult(grid.folder, table, reason, failed, left, tuple(files))


def grid_table(grid: Grid, failed: Mapping[str, str]) -> Table:
    """The table of the cells that are complete; `failed` has the reasons of failed jobs by cell."""
    rows = []
    for row in grid.rows:
        cells = [cell for cell in grid.cells if cell.row == row]
        runs = [RunReference.of_cell(cell, failed.get(cell.name, "")) for cell in cells]
        rows.append(RowSpec(row.label, row.config, tuple(runs)))
    return tabulate(grid.plan, rows, grid.test, root=grid.folder, commands=[grid.command])


@contextmanager
def local_executor(grid: Grid, workers: int) -> Iterator[Executor]:
    """An executor for this machine, with the CUDA devices that the cells may use."""
    executor = LocalExecutor(workers, grid.folder / "logs", cuda_devices=_cuda_devices(grid))
    try:
        yield executor
    finally:
        executor.stop(signal.SIGTERM)  # jobs that are still running after an error


def workers_here(grid: Grid, workers: int | None) -> int:
    """`workers`; if None, one per CUDA device that the cells may use, or a single one on the CPU."""
    return max(len(_cuda_devices(grid)), 1) if workers is None else workers


def _cuda_devices(grid: Grid) -> list[str]:
    """The devices to distribute; none if the cells name a device or the CPU."""
    devices = {row.config.device for row in grid.rows}
    return visible_cuda_devices() if devices <= {"auto", "cuda"} else []
