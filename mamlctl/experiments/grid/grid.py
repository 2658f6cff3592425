"""The folder of a grid: its plan, and a run folder for every row and seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.experiments.grid.plans import OF_TASKS, PlannedRow, as_unimproved
from mamlctl.experiments.settings import resolve_settings
from mamlctl.settings.merge import Layer
from mamlctl.settings.schema import IMPROVEMENTS, EvalConfig, TrainConfig

# Of plan.yaml.
FORMAT = 1

# What the folder of a grid holds.
PLAN = "plan.yaml"
CELLS = "cells"


@dataclass(frozen=True)
class GridRow:
    """A row of the table to be: its label, its folders' name, its settings with the first seed."""

    label: str
    slug: str
    config: TrainConfig


@dataclass(frozen=True)
class GridCell:
    """One run of a grid."""

    row: GridRow
    seed: int
    folder: Path  # absolute

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return self.folder.name

    @property
    def config(self) -> TrainConfig:
        """The settings of this run."""
        return replace(self.row.config, seed=self.seed)


@dataclass(frozen=True)
class Grid:
    """A plan with its settings, seeds and protocol, and where its cells lie."""

    folder: Path  # absolute
    plan: str
    rows: tuple[GridRow, ...]
    seeds: tuple[int, ...]
    evaluate: EvalConfig
    command: str  # that made it
    left_out: tuple[str, ...] = ()  # rows of the plan that would be the same runs as others

    @property
    def cells(self) -> list[GridCell]:
        """Every cell, the first seed of all rows first, so that a table is whole as early as can be."""
        return [
            GridCell(row, seed, self.folder / CELLS / f"{row.slug}-s{seed}")
            for seed in self.seeds
            for row in self.rows
        ]


def resolve_rows(
    rows: Sequence[PlannedRow],
    layers: Sequence[Layer],
    settings: Mapping[str, Any],
    seed: int,
    *,
    check_devices: bool = True,
) -> list[GridRow]:
    """The settings of every row.

    A flag that has no effect in some rows, as --msl-epochs in those without MSL, gives way there. An
    improvement that means nothing with the algorithm or the data is left out, and so is a row that is another
    one then.

    Args:
        rows: What each row sets, over everything else.
        layers: Presets and files, weakest first.
        settings: Those of the command line, over the layers.
        seed: The first seed.
        check_devices: They are to run on this machine.

    Raises:
        SettingsError: With every problem, and for a flag without effect in all rows.
    """
    resolved_rows, problems = list[GridRow](), list[tuple[str, Problem]]()
    flags = {name: value for name, value in settings.items() if name not in ("algo", "seed")}
    unused = set(flags)
    for row in rows:
        algo = row.algo or settings.get("algo")
        naming = [] if algo is None else [("plan", {"algo": algo})]
        stack: list[Layer] = [*layers, *naming, ("flags", flags), ("plan", {**row.values, "seed": seed})]
        try:
            resolved = resolve_settings(stack, check_devices=check_devices)
        except SettingsError as error:
            problems += [(row.label, problem) for problem in error.problems]
            continue
        unused -= {name for name in flags if resolved.sources[name] == "flags" or name in row.values}
        grid_row, row_problems = _grid_row(row, resolved.config)
        problems += [(row.label, problem) for problem in row_problems]
        others = [as_unimproved(other.config) for other in resolved_rows]
        if not (row.of_improvements and as_unimproved(grid_row.config) in others):
            resolved_rows.append(grid_row)
    refusals = _grouped(problems, len(rows)) or _alike(resolved_rows)
    refusals = refusals or [
        (f"{flag(name)} has no effect in any row", "leave it out") for name in sorted(unused)
    ]
    if refusals:
        raise SettingsError(refusals)
    return resolved_rows


def _grid_row(row: PlannedRow, config: TrainConfig) -> tuple[GridRow, list[Problem]]:
    """The row with its settings: without improvements that mean nothing; nothing else may get lost."""
    lost = [name for name, value in row.values.items() if getattr(config, name) != value]
    if row.of_improvements:
        row = row.without(lost)
        lost = [name for name in lost if name not in IMPROVEMENTS]
    problems = [
        (f"{flag(name)} {row.values[name]} has no effect", "leave it out of the grid") for name in lost
    ]
    return GridRow(row.label, row.slug, config), problems


def _grouped(problems: Sequence[tuple[str, Problem]], rows: int) -> list[Problem]:
    """Each problem once, with its row where not all have it."""
    by_problem: dict[Problem, list[str]] = {}
    for label, problem in problems:
        by_problem.setdefault(problem, []).append(label)
    return [
        problem if len(labels) == rows else (f"row '{labels[0]}': {problem[0]}", problem[1])
        for problem, labels in by_problem.items()
    ]


def _alike(rows: Sequence[GridRow]) -> list[Problem]:
    """Rows that are the same run, or that would share a folder."""
    return [
        (f"rows '{other.label}' and '{row.label}' are the same", "leave one out")
        for other, row in itertools.combinations(rows, 2)
        if row.slug == other.slug or row.config == other.config
    ]


def not_default(evaluate: EvalConfig) -> dict[str, Any]:
    """What of a test is not as it always is, but for where it runs."""
    return {
        item.name: getattr(evaluate, item.name)
        for item in fields(evaluate)
        if item.metadata["decides"] and getattr(evaluate, item.name) != item.default
    }


def check_rows(rows: Sequence[GridRow], seeds: int) -> None:
    """Raises SettingsError unless all rows are tested on the same tasks, and their seeds are several runs."""
    first = rows[0]
    problems = [
        (
            f"'{row.label}' has --init-seed and --train-seed, so that its {seeds} seeds are one run",
            "leave one out",
        )
        for row in rows
        if seeds > 1 and row.config.init_seed is not None and row.config.train_seed is not None
    ]
    problems += [
        (f"'{row.label}' has {flag(name)} {theirs}, but '{first.label}' has {ours}", "make a table for each")
        for row in rows[1:]
        for name in OF_TASKS
        if (theirs := getattr(row.config, name)) != (ours := getattr(first.config, name))
    ]
    if problems:
        raise SettingsError(problems)
