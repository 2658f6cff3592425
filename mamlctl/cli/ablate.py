"""`ablate`: its options, and what it does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mamlctl.cli.common_options import option, unused
from mamlctl.cli.grid_actions import planned_grid, run_grid
from mamlctl.cli.grid_options import PLAN, GridOptions
from mamlctl.cli.options import with_options
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.experiments.grid.plans import ORDER, PLANS, PlannedRow, grid_rows, improvement_rows
from mamlctl.run_folder import RESUME_OVERRIDES
from mamlctl.settings.fields import OUTPUT
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

if TYPE_CHECKING:
    from mamlctl.experiments.grid.grid import Grid


@with_options(GridOptions, TrainConfig)
def ablate(
    settings: dict[str, Any],
    options: GridOptions,
    plan: Annotated[
        str | None,
        option(
            PLAN,
            f"{', '.join(PLANS)}: maml and each improvement alone; maml++ without each; one after the "
            f"other; all {2 ** len(IMPROVEMENTS)}. Default: one-on.",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        option(PLAN, "Instead of a plan: a setting and its values, key=v1,v2; repeatable."),
    ] = None,
    order: Annotated[str | None, option(PLAN, f"Of --plan cumulative. Default: {ORDER}.")] = None,
    resume: Annotated[
        Path | None, option(OUTPUT, "Folder of a table to go on with, as it was planned.")
    ] = None,
) -> ExitCode:
    """Train and test a grid of improvements, and print its table; a second call goes on where one stopped."""
    options.check()
    settings = options.with_sets(settings)
    if resume is not None:
        planning: dict[str, object] = {"--plan": plan, "--grid": grid, "--order": order}
        return run_grid(_resumed_grid(resume, planning, settings, options), options)
    algo = str(options.all_settings(settings).get("algo", TrainConfig.algo))
    rows, name = _planned_rows(plan, grid, order, settings, algo)
    return run_grid(planned_grid(name, rows, settings, options), options)


def _planned_rows(
    plan: str | None, grid: list[str] | None, order: str | None, settings: Mapping[str, Any], algo: str
) -> tuple[list[PlannedRow], str]:
    """The rows, and what the plan is called. Raises SettingsError."""
    problems: list[Problem] = []
    if grid and plan is not None:
        problems.append(("--plan and --grid are given together", "use one of them"))
    if plan not in (None, *PLANS):
        problems.append((f"--plan is '{plan}'", f"use one of {', '.join(PLANS)}, or --grid key=value,value"))
    if plan != "cumulative":
        way = "add --plan cumulative, or leave it out"
        problems += unused({"--order": order}, "without --plan cumulative", way)
    if problems:
        raise SettingsError(problems)
    if grid:
        rows, name = grid_rows(grid), "grid"
    else:
        name = plan or PLANS[0]
        rows = improvement_rows(name, algo, order or ORDER)
    varied = {key for row in rows for key in row.values}
    if decided := sorted(varied & settings.keys()):
        raise SettingsError([(f"{flag(key)} is what the plan varies", "leave it out") for key in decided])
    return rows, name


def _resumed_grid(
    folder: Path, planning: Mapping[str, object], settings: Mapping[str, Any], options: GridOptions
) -> Grid:
    """The grid of a folder, perhaps with other seeds and tests. Raises SettingsError for anything else."""
    from mamlctl.experiments.grid.grid import not_default
    from mamlctl.experiments.grid.grid_folder import load_grid

    fixed = dict(planning) | options.by_flag("preset", "config", "out")
    fixed |= {flag(name): True for name in settings if name not in RESUME_OVERRIDES}
    if problems := unused(fixed, "with --resume, which keeps the plan"):
        raise SettingsError(problems)
    grid = load_grid(folder)
    first, seeds = grid.seeds[0], options.seeds
    test = {**not_default(grid.evaluate), **options.evaluation()}
    return replace(
        grid,
        rows=tuple(replace(row, config=replace(row.config, **settings)) for row in grid.rows),
        seeds=grid.seeds if seeds is None else tuple(range(first, first + seeds)),
        evaluate=evaluation_settings(test, "flag"),
    )
