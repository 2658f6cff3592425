"""`ablate`: its options, and what it does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mamlctl.cli.grid_actions import fill, grid_of
from mamlctl.cli.grid_options import PLAN, TableOptions
from mamlctl.cli.options import with_options, with_settings
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.experiments.grid.plans import ORDER, PLANS, PlannedRow, grid_rows, improvement_rows
from mamlctl.run_folder import RESUME_OVERRIDES
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.schema import OUTPUT, TrainConfig

if TYPE_CHECKING:
    from mamlctl.experiments.grid.grid import Grid


@with_settings(TrainConfig)
@with_options(TableOptions)
def ablate(
    given: dict[str, Any],
    options: TableOptions,
    plan: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PLANS)}: maml and each improvement alone; maml++ without each; one after the "
            "other; all 64. Default: one-on.",
            rich_help_panel=PLAN,
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of a plan: a setting and its values, key=v1,v2; repeatable.", rich_help_panel=PLAN
        ),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help=f"Of --plan cumulative. Default: {ORDER}.", rich_help_panel=PLAN)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of a table to go on with, as it was planned.", rich_help_panel=OUTPUT),
    ] = None,
) -> ExitCode:
    """Train and test a grid of improvements, and print its table; a second call goes on where one stopped."""
    options.check()
    asked = options.asked(given)
    if resume is not None:
        own: dict[str, object] = {
            "--plan": plan,
            "--grid": grid,
            "--order": order,
            "--preset": options.preset,
        }
        own |= {"--config": options.config, "--out": options.out}
        return fill(_resumed(resume, own, asked, options), options)
    rows, name = _planned(plan, grid, order, asked, str(options.said(asked).get("algo", TrainConfig.algo)))
    return fill(grid_of(name, rows, asked, options), options)


def _planned(
    plan: str | None, grid: list[str] | None, order: str | None, given: Mapping[str, Any], algo: str
) -> tuple[list[PlannedRow], str]:
    """The rows, and what the plan is called. Raises SettingsError."""
    problems: list[Problem] = []
    if grid and plan is not None:
        problems.append(("--plan and --grid are given together", "use one of them"))
    if plan not in (None, *PLANS):
        problems.append((f"--plan is '{plan}'", f"use one of {', '.join(PLANS)}, or --grid key=value,value"))
    if order is not None and plan != "cumulative":
        problems.append(
            ("--order has no effect without --plan cumulative", "add --plan cumulative, or leave it out")
        )
    if problems:
        raise SettingsError(problems)
    if grid:
        rows, name = grid_rows(grid), "grid"
    else:
        name = plan or PLANS[0]
        rows = improvement_rows(name, algo, order or ORDER)
    decided = sorted({setting for row in rows for setting in row.values if setting in given})
    if decided:
        raise SettingsError([(f"{flag(key)} is what the plan varies", "leave it out") for key in decided])
    return rows, name


def _resumed(
    folder: Path, own: Mapping[str, object], asked: Mapping[str, Any], options: TableOptions
) -> Grid:
    """The grid of a folder, perhaps with other seeds and tests. Raises SettingsError for anything else."""
    from mamlctl.experiments.grid.grid import not_default
    from mamlctl.experiments.grid.grid_folder import load_grid

    moved = {name: value for name, value in asked.items() if name in RESUME_OVERRIDES}
    own = dict(own) | {flag(name): value for name, value in asked.items() if name not in RESUME_OVERRIDES}
    problems = [
        (f"{name} has no effect with --resume, which keeps the plan", "leave it out")
        for name, value in own.items()
        if value is not None
    ]
    if problems:
        raise SettingsError(problems)
    grid = load_grid(folder)
    first, seeds = grid.seeds[0], options.seeds
    test = {**not_default(grid.evaluate), **options.evaluation()}
    return replace(
        grid,
        rows=tuple(replace(row, config=replace(row.config, **moved)) for row in grid.rows),
        seeds=grid.seeds if seeds is None else tuple(range(first, first + seeds)),
        evaluate=evaluation_settings(test, "flag"),
    )
