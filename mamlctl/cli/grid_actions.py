"""Actions of `ablate` and `compare` on a grid: run it, estimate its time, print its commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mamlctl.cli.common_options import begin_work
from mamlctl.cli.grid_options import GridOptions, table_settings
from mamlctl.core import formatting
from mamlctl.core.errors import STOP_EXIT_CODES, ExitCode
from mamlctl.core.events import OnEvent, Waiting
from mamlctl.core.files import check_out
from mamlctl.core.user_code.kinds import named_code, trust_runs
from mamlctl.display.console import say, stderr_console, write_text
from mamlctl.display.estimate import estimate_document, show_estimate
from mamlctl.experiments.grid.plans import PlannedRow
from mamlctl.experiments.interrupts import parse_duration
from mamlctl.report.guard import check_table
from mamlctl.settings.schema import TrainConfig

if TYPE_CHECKING:
    from mamlctl.experiments.executors.jobs import Executor
    from mamlctl.experiments.grid.ablate import GridResult
    from mamlctl.experiments.grid.grid import Grid

# Flags that only affect how a call runs and what it prints, without and with a value.
CALL_FLAGS = ("--json", "--csv", "--markdown", "--latex", "--quiet", "--offline")
CALL_FLAGS_WITH_VALUE = ("--time-limit", "--workers", "--sort", "--fail-under", "--fail-over")


def planned_grid(
    name: str,
    rows: Sequence[PlannedRow],
    settings: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    options: GridOptions,
) -> Grid:
    """The grid of the planned rows, in a new folder or in the folder that already has this plan.

    Args:
        name: the name of the plan.
        rows: the rows, each with the settings that only it has.
        settings: the settings from the command line.
        evaluation: the test settings from the command line.
        options: the other options of the command line.

    Raises:
        SettingsError: a row is invalid, two rows are equal, or an existing grid has other rows.
        MamlctlError: the folder exists and does not contain a grid.
    """
    from mamlctl.experiments.grid.grid import check_rows, resolve_rows
    from mamlctl.experiments.grid.grid_folder import open_grid

    options.check_code_in_file(settings)
    evaluate = table_settings(evaluation)
    seed = options.all_settings(settings).get("seed", TrainConfig.seed)
    resolved = resolve_rows(rows, options.base_layers, settings, seed)
    seeds = 3 if options.seeds is None else options.seeds
    check_rows(resolved, seeds)
    first = resolved[0].config.seed
    grid = open_grid(options.out, name, resolved, range(first, first + seeds), evaluate, grid_command())
    if options.trust_code:
        trust_runs(cell.folder for cell in grid.cells)
    labels = {row.label for row in resolved}
    return replace(grid, left_out=tuple(row.label for row in rows if row.label not in labels))


def grid_command() -> str:
    """The command line without the flags that only affect how this call runs and what it prints."""
    words, typed = ["mamlctl"], iter(sys.argv[1:])
    for word in typed:
        name, equals, _ = word.partition("=")
        if name in CALL_FLAGS_WITH_VALUE and not equals:
            next(typed, None)
        elif name not in (*CALL_FLAGS, *CALL_FLAGS_WITH_VALUE):
            words.append(word)
    return shlex.join(words)


def run_grid(grid: Grid, options: GridOptions) -> ExitCode:
    """Train and test the missing cells and print the table, or print only the estimate or the commands.

    Raises SettingsError or MamlctlError for a limit that is invalid, or that a row does not reach.
    """
    if options.print_commands or options.slurm:
        from mamlctl.experiments.grid.command_lines import cell_lines, slurm_script

        # These commands fill the folders of this grid, so that a plain call afterwards prints the table.
        lines = cell_lines(grid)
        text = slurm_script(grid.folder.name, lines) if options.slurm else "\n".join(lines)
        write_text(sys.stdout, text + "\n")
        return ExitCode.OK
    limit = options.limit(grid.rows[0].config)
    if not options.dry_run:
        check_out(grid.folder)
    cells, local, offline = len(grid.cells), options.executor == "local", options.offline
    limit_s = None if options.time_limit is None else parse_duration(options.time_limit)
    work = f"{len(grid.rows)} rows, {cells} {formatting.plural(cells, 'cell')}, in {grid.folder}"
    with options.display(work) as display:
        from mamlctl.experiments.grid.ablate import ablate, check_data, local_executor, workers_here
        from mamlctl.experiments.grid.estimate import estimate
        from mamlctl.experiments.grid.grid import check_devices
        from mamlctl.experiments.grid.scheduler import pending_cells

        begin_work()
        workers = workers_here(grid, options.workers)
        if options.dry_run or (local and pending_cells(grid)):
            if local:
                check_devices(grid.rows)
            check_data(grid, offline=offline, on_event=display)
        if options.dry_run:
            time = estimate(grid, workers, offline=offline, on_event=display)
        else:
            executor = local_executor(grid, workers) if local else _ray_executor(options, display)
            result = ablate(grid, executor, time_limit_s=limit_s, on_event=display, offline=offline)
    if options.dry_run:
        options.write(time, estimate_document(time), show_estimate)
        return ExitCode.OK
    options.write_table(result.table)
    code = _report_ending(result, grid, stderr_console())
    if limit is not None and result.reason in ("", "time limit"):
        check_table(result.table, limit)
    return code


def _ray_executor(options: GridOptions, on_event: OnEvent) -> AbstractContextManager[Executor]:
    from mamlctl.experiments.executors.ray_cluster import open_cluster

    on_event(Waiting("connecting to Ray"))
    return open_cluster(
        options.address or "auto",
        slots=options.workers,
        cpus=1.0 if options.cell_cpus is None else options.cell_cpus,
        gpus=options.cell_gpus or 0.0,
        slice_s=parse_duration(options.slice or "10m", "--slice"),
        on_event=on_event,
    )


def _report_ending(result: GridResult, grid: Grid, console: Console) -> ExitCode:
    """Print where the report is, what failed and what is left; return the exit code."""
    if result.files:
        say(console, f"report  {result.files[-1]}")
    for name, reason in result.failed.items():
        log = f"logs/{name}.txt"
        where = f" (see {log})" if (result.folder / log).is_file() else ""
        say(console, ("failed  ", "bold red"), f"{name}: {reason}{where}")
    if result.left:
        trust = " --trust-code" if any(named_code(vars(row.config)) for row in grid.rows) else ""
        resume = f"mamlctl ablate --resume {shlex.quote(str(result.folder))}{trust}"
        say(
            console,
            f"{result.left} {formatting.plural(result.left, 'cell')} left; resume with: ",
            (resume, "cyan"),
        )
    incomplete = result.failed or (result.left and not result.reason)
    code = STOP_EXIT_CODES[result.reason]
    return ExitCode.FAILED if code == ExitCode.OK and incomplete else code
