"""What `ablate` and `compare` do with a grid: fill it, estimate it, print its commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from mamlctl.core.errors import STOP_EXIT_CODES, ExitCode
from mamlctl.core.events import OnEvent
from mamlctl.display.console import say, write_json
from mamlctl.display.displays import open_display
from mamlctl.display.estimate import estimate_document, show_estimate
from mamlctl.experiments.grid.plans import PlannedRow
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.schema import TrainConfig

if TYPE_CHECKING:
    from mamlctl.experiments.executors.jobs import Executor
    from mamlctl.experiments.grid.ablate import GridResult
    from mamlctl.experiments.grid.grid import Grid
from mamlctl.cli.grid_options import TableOptions

ASIDE = ("--json", "--csv", "--markdown", "--latex", "--quiet", "--offline")

ASIDE_WITH_VALUE = ("--time-limit", "--workers", "--sort")


def grid_of(name: str, rows: Sequence[PlannedRow], given: Mapping[str, Any], options: TableOptions) -> Grid:
    """The grid of these rows, new or there already. Raises SettingsError, MamlctlError."""
    from mamlctl.experiments.grid.grid import check_rows, resolve_rows
    from mamlctl.experiments.grid.grid_folder import open_grid

    evaluate = evaluation_settings(options.evaluation(), "flag")
    layers = options.layers()
    seed = options.said(given).get("seed", TrainConfig.seed)
    found = resolve_rows(rows, layers, given, seed, here=options.here)
    seeds = 3 if options.seeds is None else options.seeds
    check_rows(found, seeds)
    first = found[0].config.seed
    grid = open_grid(options.out, name, found, range(first, first + seeds), evaluate, command_line())
    left_out = [row.label for row in rows if row.label not in {row.label for row in found}]
    return replace(grid, left_out=tuple(left_out))


def command_line() -> str:
    """What was typed, but for what only decides how this call works and what it prints."""
    words, rest = ["mamlctl"], iter(sys.argv[1:])
    for word in rest:
        name, _, value = word.partition("=")
        if name in ASIDE_WITH_VALUE and not value:
            next(rest, None)
        elif name not in (*ASIDE, *ASIDE_WITH_VALUE):
            words.append(word)
    return shlex.join(words)


def fill(grid: Grid, options: TableOptions) -> ExitCode:
    """Train and test what is missing, or only tell what that would be."""
    if options.print_commands or options.slurm:
        return _print_commands(grid, slurm=options.slurm)
    from mamlctl.experiments.grid import ablate as command
    from mamlctl.experiments.grid.scheduler import has_pending_cells
    from mamlctl.experiments.interrupts import parse_duration

    limit = None if options.time_limit is None else parse_duration(options.time_limit)
    with open_display(Console(stderr=True), quiet=options.quiet) as display:
        workers = command.workers_here(grid, options.workers)
        if options.dry_run or (options.executor == "local" and has_pending_cells(grid)):
            command.check_data(grid, offline=options.offline, on_event=display)
        if options.dry_run:
            return _dry_run(grid, workers, options, display)
        executor = (
            _ray(options, display) if options.executor == "ray" else command.local_executor(grid, workers)
        )
        result = command.ablate(grid, executor, time_limit_s=limit, on_event=display, offline=options.offline)
    options.write(result.table)
    return _ending(result, Console(stderr=True))


def _ray(options: TableOptions, on_event: OnEvent) -> AbstractContextManager[Executor]:
    from mamlctl.experiments.executors.ray_cluster import open_cluster
    from mamlctl.experiments.interrupts import parse_duration

    return open_cluster(
        options.address or "auto",
        slots=options.workers,
        cpus=1.0 if options.cell_cpus is None else options.cell_cpus,
        gpus=options.cell_gpus or 0.0,
        slice_s=parse_duration(options.slice or "10m"),
        on_event=on_event,
    )


def _ending(result: GridResult, console: Console) -> ExitCode:
    """Where everything is, what is left, and the exit code."""
    if result.files:
        say(console, f"report  {result.files[-1]}")
    for name, why in result.failed.items():
        say(console, ("failed  ", "bold red"), f"{name}: {why} (its words are in logs/{name}.txt)")
    if result.left:
        cells = "cell is" if result.left == 1 else "cells are"
        say(
            console,
            f"{result.left} {cells} left; go on: ",
            (f"mamlctl ablate --resume {shlex.quote(str(result.folder))}", "cyan"),
        )
    undone = result.failed or (result.left and not result.reason)
    code = STOP_EXIT_CODES[result.reason]
    return ExitCode.FAILED if code == ExitCode.OK and undone else code


def _print_commands(grid: Grid, *, slurm: bool) -> ExitCode:
    """A line for every cell; they fill the same folders, so that the same call then makes the table."""
    from mamlctl.experiments.grid.command_lines import cell_lines, slurm_script

    lines = cell_lines(grid)
    typer.echo(slurm_script(grid.folder.name, lines) if slurm else "\n".join(lines))
    return ExitCode.OK


def _dry_run(grid: Grid, workers: int, options: TableOptions, on_event: OnEvent) -> ExitCode:
    from mamlctl.experiments.grid.estimate import estimate

    found = estimate(grid, workers, offline=options.offline, on_event=on_event)
    if options.json:
        write_json(sys.stdout, estimate_document(found))
    else:
        show_estimate(Console(), found)
    return ExitCode.OK
