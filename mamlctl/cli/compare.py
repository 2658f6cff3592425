"""The `compare` command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mamlctl.cli.common_options import (
    Nproc,
    RankTimeout,
    begin_work,
    option,
    share_of_process,
    started_models,
    together,
    unused,
)
from mamlctl.cli.grid_actions import grid_command, planned_grid, run_grid
from mamlctl.cli.grid_options import DRY, PLAN, TEST_OPTIONS, GridOptions, table_settings
from mamlctl.cli.options import with_options
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.files import check_out
from mamlctl.core.formatting import plural
from mamlctl.core.problems import flag
from mamlctl.core.process import SIDE_BY_SIDE, check_single
from mamlctl.data.rules import with_figure
from mamlctl.display.console import say, stderr_console
from mamlctl.display.run_results import show_runs
from mamlctl.experiments.grid.grid import PLAN as PLAN_FILE
from mamlctl.experiments.grid.grid import is_grid
from mamlctl.experiments.grid.grid_folder import load_grid
from mamlctl.experiments.grid.plans import algorithm_rows
from mamlctl.experiments.runs.listing import list_runs
from mamlctl.report.guard import check_table
from mamlctl.run_folder import CONFIG, open_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import FIELDS, TrainConfig
from mamlctl.settings.variables import RUNS, variable_values
from mamlctl.shipped_models import local_run

# Training settings that are also settings of an evaluation.
TEST_SETTINGS = FIELDS.keys() & {item.name for item in fields(EvalConfig)} - {"dataset", "classes"}

# Options for training or planning, which have no effect on runs that are already trained.
TRAINING_OPTIONS = ("seeds", "preset", "config", "workers", "time_limit", *DRY)


@with_options(GridOptions, TrainConfig, TEST_OPTIONS)
def compare(
    settings: dict[str, Any],
    evaluation: dict[str, Any],
    options: GridOptions,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run folders, table folders or models that ship; the first is the baseline.",
            metavar="RUNS",
            autocompletion=started_models,
        ),
    ] = None,
    algos: Annotated[
        str | None,
        option(
            PLAN,
            "Instead of run folders: algorithms to train unless they are trained; the first is the baseline, "
            "e.g. maml,maml++,protonet.",
        ),
    ] = None,
    list_: Annotated[
        bool,
        option(None, f"List the runs and tables under runs/, or under {RUNS}, then exit.", "--list"),
    ] = False,
    nproc: Nproc = None,
    rank_timeout: RankTimeout = None,
) -> ExitCode:
    """The command `mamlctl compare`."""
    options.check()
    if list_:
        given: dict[str, object] = {str(path): True for path in runs or []}
        given |= {"--algos": algos, "--nproc": nproc, "--rank-timeout": rank_timeout} | {
            flag(name): True for name in settings | evaluation
        }
        return _list_runs(given | options.changed(), options)
    settings = options.with_sets(settings)
    if runs:
        _refuse_training(settings, options, algos)
        if (code := share_of_process(nproc, rank_timeout, trust_code=options.trust_code)) is not None:
            return code
        values = {**variable_values(EvalConfig), **evaluation, **settings}
        return _compare_runs([*map(local_run, runs)], table_settings(values), options, rank_timeout)
    check_single("mamlctl compare without run folders", f"run it without torchrun; {SIDE_BY_SIDE}")
    problems = unused({"--nproc": nproc}, "without run folders", SIDE_BY_SIDE)
    if problems := problems + unused({"--rank-timeout": rank_timeout}, "without run folders"):
        raise SettingsError(problems)
    if algos is None:
        raise SettingsError([("there is nothing to compare", "name run folders, or --algos maml,maml++")])
    if "algo" in settings:
        raise SettingsError([("--algo has no effect with --algos", "leave it out")])
    return run_grid(planned_grid("algos", algorithm_rows(algos), settings, evaluation, options), options)


def _list_runs(given: Mapping[str, object], options: GridOptions) -> ExitCode:
    """Print the list of runs. Raises SettingsError for an option that has no effect on it."""
    if problems := unused(given, "with --list"):
        raise SettingsError(problems)
    listed = list_runs()
    options.write(listed, {"format": 1, **asdict(listed)}, show_runs)
    return ExitCode.OK


def _refuse_training(settings: Mapping[str, Any], options: GridOptions, algos: str | None) -> None:
    """Raise SettingsError for options that only affect training."""
    training: dict[str, object] = {"--algos": algos, "--executor": options.executor != "local"}
    training |= options.by_flag(*TRAINING_OPTIONS)
    training |= {flag(name): True for name in settings if name not in TEST_SETTINGS}
    if problems := unused(training, "with run folders, which are trained already"):
        raise SettingsError(problems)


def _compare_runs(
    runs: list[Path], evaluate: EvalConfig, options: GridOptions, rank_timeout: str | None
) -> ExitCode:
    out = options.out
    if out is not None:
        check_out(out)
        if any((out / name).exists() for name in (PLAN_FILE, CONFIG)):
            raise SettingsError([(f"--out {out} already contains a table or a run", "choose another --out")])
    grids = {run: load_grid(run) for run in runs if is_grid(run)}
    first = grids[runs[0]].rows[0] if runs[0] in grids else open_run(runs[0])
    limit = options.limit(first.config)
    cells = [cell.folder for grid in grids.values() for cell in grid.cells]
    options.trust_code_of([*(run for run in runs if run not in grids), *cells])
    work = f"comparing {len(runs)} {plural(len(runs), 'run')}"
    with options.display(work) as display, together(rank_timeout):
        from mamlctl.experiments.grid.compare import compare  # imports torch
        from mamlctl.report.report_folder import write_files

        begin_work()
        if out is not None:
            evaluate = with_figure(evaluate)
        command, offline = grid_command(), options.offline
        table = compare(
            runs, evaluate, offline=offline, command=command, on_event=display, folder=options.out
        )
    files = [] if out is None else write_files(table, out)
    options.write_table(table)
    if files:
        say(stderr_console(), f"report  {files[-1]}")
    if limit is not None:
        check_table(table, limit)
    return ExitCode.OK
