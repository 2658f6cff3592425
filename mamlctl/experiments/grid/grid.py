"""A grid: the rows of a plan with their settings, and a cell (run folder) per row and seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.data.rules import with_figure
from mamlctl.experiments.grid.plans import OF_TASKS, PlannedRow, as_unimproved
from mamlctl.experiments.settings import absolute_places, resolve_settings
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.merge import Layer
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

# The contents of a grid's folder, and the format of its plan.
PLAN = "plan.yaml"
CELLS = "cells"
FORMAT = 1


@dataclass(frozen=True)
class GridRow:
    """A row of a grid: its label, the name of its folders, and its settings with the first seed."""

    label: str
    slug: str
    config: TrainConfig
    default_engine: bool = False  # the algorithm chose the engine


@dataclass(frozen=True)
class GridCell:
    """One run of a grid."""

    row: GridRow
    seed: int
    folder: Path  # absolute

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.folder.name

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return replace(self.row.config, seed=self.seed)


@dataclass(frozen=True)
class Grid:
    """A plan with its settings, seeds and evaluation, and the folder of its cells."""

    folder: Path  # absolute
    plan: str
    rows: tuple[GridRow, ...]
    seeds: tuple[int, ...]
    evaluate: EvalConfig
    command: str  # the command line that created it
    left_out: tuple[str, ...] = ()  # rows of the plan that would be equal to others

    @property
    def test(self) -> EvalConfig:
        """The test of every cell: `evaluate`, and the scores for the report's figure of adaptation."""
        return with_figure(self.evaluate)

    @property
    def cells(self) -> list[GridCell]:
        """All cells, with the first seed of every row first, so that the table is soon complete."""
        return [
            GridCell(row, seed, self.folder / CELLS / f"{row.slug}-s{seed}")
            for seed in self.seeds
            for row in self.rows
        ]


def is_grid(folder: Path) -> bool:
    """Whether a folder is that of a grid, not of a run."""
    return (folder / PLAN).is_file()


def resolve_rows(
    rows: Sequence[PlannedRow],
    layers: Sequence[Layer],
    settings: Mapping[str, Any],
    seed: int,
) -> list[GridRow]:
    """Resolve the settings of every row.

    A flag may have no effect in some rows, such as --msl-epochs in rows without MSL. Improvements without
    meaning for the algorithm or the data are left out, and so are rows that are then equal to another row.

    Args:
        rows: the rows, whose own settings override all others.
        layers: presets and files, weakest first.
        settings: the settings from the command line, which override the layers.
        seed: the first seed.

    Returns:
        The rows that are left, in order.

    Raises:
        SettingsError: all problems, including flags that have no effect in any row.
    """
    resolved_rows, problems = list[GridRow](), list[tuple[str, Problem]]()
    flags = {name: value for name, value in settings.items() if name not in ("algo", "seed")}
    unused = set(flags)
    for row in rows:
        algo = row.algo or settings.get("algo")
        naming = [] if algo is None else [("plan", {"algo": algo})]
        stack: list[Layer] = [*layers, *naming, ("flags", flags), ("plan", {**row.values, "seed": seed})]
        try:
            resolved = resolve_settings(stack)
        except SettingsError as error:
            problems += [(row.label, problem) for problem in error.problems]
            continue
        unused -= {name for name in flags if resolved.sources[name] == "flags" or name in row.values}
        grid_row, row_problems = _effective_row(row, resolved.config)
        is_default = resolved.sources["engine"] == f"algorithm {resolved.config.algo}"
        grid_row = replace(grid_row, default_engine=is_default)
        problems += [(row.label, problem) for problem in row_problems]
        others = [as_unimproved(other.config) for other in resolved_rows]
        if not (row.of_improvements and as_unimproved(grid_row.config) in others):
            resolved_rows.append(grid_row)
    refusals = _grouped_problems(problems, len(rows)) or _equal_row_problems(resolved_rows)
    refusals = refusals or [
        (f"{flag(name)} has no effect in any row", "leave it out") for name in sorted(unused)
    ]
    if refusals:
        raise SettingsError(refusals)
    return resolved_rows


def check_devices(rows: Sequence[GridRow]) -> None:
    """Raise SettingsError unless this machine has the devices of all rows and supports their arithmetic."""
    from mamlctl.engine.devices import device_problems  # imported here, since it imports torch

    problems = [
        (row.label, problem)
        for row in rows
        for problem in device_problems(row.config.device, row.config.precision, row.config.cuda_graph)
    ]
    if problems:
        raise SettingsError(_grouped_problems(problems, len(rows)))


def _effective_row(row: PlannedRow, config: TrainConfig) -> tuple[GridRow, list[Problem]]:
    """The row without improvements that have no meaning, and problems for other values without effect."""
    values = {**row.values, **absolute_places(row.values)}
    lost = [name for name, value in values.items() if getattr(config, name) != value]
    if row.of_improvements:
        row = replace(row, added=tuple(name for name in row.added if name not in lost))
        lost = [name for name in lost if name not in IMPROVEMENTS]
    problems = [
        (f"{flag(name)} {row.values[name]} has no effect", "leave it out of the grid") for name in lost
    ]
    return GridRow(row.label, row.slug, config), problems


def _grouped_problems(problems: Sequence[tuple[str, Problem]], rows: int) -> list[Problem]:
    """Each problem once, with the name of a row unless all rows have it."""
    by_problem: dict[Problem, list[str]] = {}
    for label, problem in problems:
        by_problem.setdefault(problem, []).append(label)
    return [
        problem if len(labels) == rows else (f"row '{labels[0]}': {problem[0]}", problem[1])
        for problem, labels in by_problem.items()
    ]


def _equal_row_problems(rows: Sequence[GridRow]) -> list[Problem]:
    """Problems for rows that have the same settings, or would share a folder."""
    return [
        (f"rows '{other.label}' and '{row.label}' are the same", "remove one of them")
        for other, row in itertools.combinations(rows, 2)
        if row.slug == other.slug or row.config == other.config
    ]


def not_default(evaluate: EvalConfig) -> dict[str, Any]:
    """The settings of an evaluation that differ from their defaults and decide its results."""
    return {
        item.name: getattr(evaluate, item.name)
        for item in fields(evaluate)
        if item.metadata["decides"] and getattr(evaluate, item.name) != item.default
    }


def check_rows(rows: Sequence[GridRow], seeds: int) -> None:
    """Raise SettingsError unless all rows have the same test tasks and their seeds make a difference."""
    first = rows[0]
    problems = [
        (
            f"'{row.label}' has --init-seed and --train-seed, so its {seeds} seeds would be the same run",
            "leave one of them out",
        )
        for row in rows
        if seeds > 1 and row.config.init_seed is not None and row.config.train_seed is not None
    ]
    for row, name in itertools.product(rows[1:], OF_TASKS):
        ours, theirs = getattr(first.config, name), getattr(row.config, name)
        if ours != theirs:
            fact = f"'{row.label}' has {flag(name)} {theirs}, but '{first.label}' has {ours}"
            problems.append((fact, "make separate tables"))
    if problems:
        raise SettingsError(problems)


def common_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that have the same value in all of these."""
    first, *others = settings
    return {key: value for key, value in first.items() if all(other[key] == value for other in others)}
