"""`compare`: its options, and what it does with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mamlctl.cli.grid_actions import command_line, fill, grid_of
from mamlctl.cli.grid_options import PLAN, TableOptions
from mamlctl.cli.options import with_options, with_settings
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.display.console import say
from mamlctl.display.displays import open_display
from mamlctl.experiments.grid.plans import algorithm_rows
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.schema import EvalConfig, TrainConfig

# Settings of training that, of trained runs, a test has too.
OF_TESTS = ("queries", "eval_seed", "adapts", "inner_steps", "inner_lr", "bn", "device", "data_root")

# What trains or plans, and so means nothing with runs that are trained.
OF_TRAINING = ("seeds", "preset", "config", "workers", "time_limit", "dry_run", "print_commands", "slurm")


@with_settings(TrainConfig)
@with_options(TableOptions)
def compare(
    given: dict[str, Any],
    options: TableOptions,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or folders of tables; the first is the baseline."),
    ] = None,
    algos: Annotated[
        str | None,
        typer.Option(
            help="Instead of run folders: algorithms, trained where they are missing (maml,maml++,protonet); "
            "the first is the baseline.",
            rich_help_panel=PLAN,
        ),
    ] = None,
) -> ExitCode:
    """Compare trained runs, or algorithms that are trained first, on the same test tasks."""
    options.check()
    asked = options.asked(given)
    if runs:
        return _of_runs(runs, _of_tests(asked, options, algos), options)
    if algos is None:
        raise SettingsError([("there is nothing to compare", "name run folders, or --algos maml,maml++")])
    if "algo" in asked:
        raise SettingsError([("--algo has no effect with --algos", "leave it out")])
    return fill(grid_of("algos", algorithm_rows(algos), asked, options), options)


def _of_tests(asked: Mapping[str, Any], options: TableOptions, algos: str | None) -> EvalConfig:
    """The test that was asked for. Raises SettingsError for what only training has a use for."""
    unused = ["algos"] * (algos is not None) + [name for name in OF_TRAINING if getattr(options, name)]
    unused += ["executor"] * (options.executor != "local") + [name for name in asked if name not in OF_TESTS]
    problems: list[Problem] = [
        (f"{flag(name)} has no effect with run folders, which are trained", "leave it out") for name in unused
    ]
    if problems:
        raise SettingsError(problems)
    return evaluation_settings({**options.evaluation(), **asked}, "flag")


def _of_runs(runs: list[Path], evaluate: EvalConfig, options: TableOptions) -> ExitCode:
    from mamlctl.experiments.grid.compare import compare as command
    from mamlctl.experiments.grid.grid import PLAN as PLAN_FILE
    from mamlctl.report.report_folder import write_files
    from mamlctl.run_folder import CONFIG

    out = options.out
    if out is not None and any((out / name).exists() for name in (PLAN_FILE, CONFIG)):
        raise SettingsError([(f"--out {out} has a table or a run of its own", "choose another --out")])
    with open_display(Console(stderr=True), quiet=options.quiet) as display:
        table = command(runs, evaluate, offline=options.offline, command=command_line(), on_event=display)
    files = write_files(table, out.expanduser()) if out is not None else []
    options.write(table)
    if files:
        say(Console(stderr=True), f"report  {files[-1]}")
    return ExitCode.OK
