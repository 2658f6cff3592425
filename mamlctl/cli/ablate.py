"""The `ablate` command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mamlctl.cli.common_options import option, unused
from mamlctl.cli.grid_actions import planned_grid, run_grid
from mamlctl.cli.grid_options import PLAN, TEST_OPTIONS, GridOptions, table_settings
from mamlctl.cli.options import with_options
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.core.user_code.kinds import named_code, trust_runs
from mamlctl.experiments.grid.plans import ORDER, PLANS, PlannedRow, grid_rows, improvement_rows
from mamlctl.experiments.runs.search import latest_unfinished_table, means_latest
from mamlctl.run_folder import RESUME_OVERRIDES
from mamlctl.settings.fields import OUTPUT
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig
from mamlctl.settings.variables import variable_values

if TYPE_CHECKING:
    from mamlctl.experiments.grid.grid import Grid


@with_options(GridOptions, TrainConfig, TEST_OPTIONS)
def ablate(
    settings: dict[str, Any],
    evaluation: dict[str, Any],
    options: GridOptions,
    plan: Annotated[
        str | None,
        option(
            PLAN,
            "Rows: maml and each improvement alone (one-on), maml++ without each (one-off), improvements "
            f"added one by one (cumulative), or all {2 ** len(IMPROVEMENTS)} sets (full). Default: one-on.",
            autocompletion=lambda: list(PLANS),
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        option(PLAN, "Instead of a plan: a setting and its values (repeatable), e.g. inner_lr=0.1,0.4."),
    ] = None,
    order: Annotated[
        str | None, option(PLAN, f"With --plan cumulative: order of the improvements (default: {ORDER}).")
    ] = None,
    resume: Annotated[
        Path | None,
        option(
            OUTPUT,
            "Resume the grid in this folder with its saved plan; latest: the newest unfinished one that is "
            "not in use.",
        ),
    ] = None,
) -> ExitCode:
    """The command `mamlctl ablate`."""
    options.check()
    settings = options.with_sets(settings)
    if resume is not None:
        if means_latest(resume):
            resume = latest_unfinished_table()
            options.say(f"resuming the latest unfinished table, {resume}")
        planning: dict[str, object] = {"--plan": plan, "--grid": grid, "--order": order}
        return run_grid(_resumed_grid(resume, planning, settings, evaluation, options), options)
    algo = str(options.all_settings(settings).get("algo", TrainConfig.algo))
    rows, name = _planned_rows(plan, grid, order, settings, algo)
    return run_grid(planned_grid(name, rows, settings, evaluation, options), options)


def _planned_rows(
    plan: str | None, grid: list[str] | None, order: str | None, settings: Mapping[str, Any], algo: str
) -> tuple[list[PlannedRow], str]:
    """The rows and the name of the plan. Raises SettingsError for options that do not fit together."""
    problems: list[Problem] = []
    if grid and plan is not None:
        problems.append(("--plan and --grid are given together", "use one of them"))
    if plan not in (None, *PLANS):
        problems.append(
            (
                f"--plan is '{plan}', which is not a plan",
                f"use one of {', '.join(PLANS)}, or --grid key=value,value",
            )
        )
    if plan != "cumulative":
        hint = "add --plan cumulative, or leave it out"
        problems += unused({"--order": order}, "without --plan cumulative", hint)
    if problems:
        raise SettingsError(problems)
    if grid:
        rows, name = grid_rows(grid), "grid"
    else:
        name = plan or PLANS[0]
        rows = improvement_rows(name, algo, order or ORDER)
    varied = {key for row in rows for key in row.values}
    if decided := sorted(varied & settings.keys()):
        raise SettingsError([(f"{flag(key)} is varied by the plan", "leave it out") for key in decided])
    return rows, name


def _resumed_grid(
    folder: Path,
    planning: Mapping[str, object],
    settings: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    options: GridOptions,
) -> Grid:
    """The grid of a folder, with seeds and test settings from the command line.

    Args:
        folder: the folder of the grid.
        planning: options that only a new plan reads, by flag.
        settings: training settings from the command line; only those that a resumed run may change.
        evaluation: test settings from the command line.
        options: the other options.

    Raises:
        SettingsError: an option would change the plan.
    """
    from mamlctl.experiments.grid.grid import not_default
    from mamlctl.experiments.grid.grid_folder import load_grid

    fixed = dict(planning) | options.by_flag("preset", "config", "out")
    fixed |= {flag(name): True for name in settings if name not in RESUME_OVERRIDES}
    if problems := unused(fixed, "with --resume, which keeps the plan"):
        raise SettingsError(problems)
    grid = load_grid(folder)
    code = [reference for row in grid.rows for reference in named_code(vars(row.config)).values()]
    if code and not options.trust_code:
        fact = f"the plan in {folder} names code ({code[0]}), which was not run"
        raise SettingsError([(fact, "add --trust-code")])
    if code:
        trust_runs(cell.folder for cell in grid.cells)
    first, seeds = grid.seeds[0], options.seeds
    changes = {**variable_values(TrainConfig), **settings}
    test = {**not_default(grid.evaluate), **evaluation}
    return replace(
        grid,
        rows=tuple(replace(row, config=replace(row.config, **changes)) for row in grid.rows),
        seeds=grid.seeds if seeds is None else tuple(range(first, first + seeds)),
        evaluate=table_settings(test),
    )
