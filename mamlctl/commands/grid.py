"""The folder of a grid: its plan, and a run folder for every row and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mamlctl.checks import Problem, flag
from mamlctl.commands.data import complete, resolve_settings
from mamlctl.config import FIELDS, IMPROVEMENTS, EvalConfig, TrainConfig
from mamlctl.errors import MamlctlError, SettingsError
from mamlctl.layers import Layer, evaluation_settings, resolve
from mamlctl.plans import OF_TASKS, PlannedRow, as_maml
from mamlctl.runs import CONFIG, MOVABLE, lasting, one_writer, open_run, shared, write_text

FORMAT, PLAN, CELLS = 1, "plan.yaml", "cells"
HERE = ("device", "data_root")  # of an evaluation: where it runs, not what it finds


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
    given: Mapping[str, Any],
    seed: int,
    *,
    here: bool = True,
) -> list[GridRow]:
    """The settings of every row: `layers` (presets, files), then `given` (flags), then what the row sets.

    A flag that has no effect in some rows, as --msl-epochs in those without MSL, gives way there. An
    improvement that means nothing with the algorithm or the data is left out, and so is a row that is another
    one then. `here`: they are to run on this machine. Raises SettingsError with every problem, and for a flag
    without effect in all rows.
    """
    found, problems = list[GridRow](), list[tuple[str, Problem]]()
    flags = {name: value for name, value in given.items() if name not in ("algo", "seed")}
    unused = set(flags)
    for row in rows:
        algo = row.algo or given.get("algo")
        naming = [("plan", {"algo": algo})] if algo is not None else []
        stack: list[Layer] = [*layers, *naming, ("flags", flags), ("plan", {**row.values, "seed": seed})]
        try:
            resolved = resolve_settings(stack, here=here)
        except SettingsError as error:
            problems += [(row.label, problem) for problem in error.problems]
            continue
        unused -= {name for name in flags if resolved.sources[name] == "flags" or name in row.values}
        made, refused = _made(row, resolved.config)
        problems += [(row.label, problem) for problem in refused]
        if not (row.of_improvements and as_maml(made.config) in [as_maml(other.config) for other in found]):
            found.append(made)
    told = _grouped(problems, len(rows)) or _alike(found)
    told = told or [(f"{flag(name)} has no effect in any row", "leave it out") for name in sorted(unused)]
    if told:
        raise SettingsError(told)
    return found


def _made(row: PlannedRow, config: TrainConfig) -> tuple[GridRow, list[Problem]]:
    """The row as its settings became: without improvements that mean nothing; nothing else may get lost."""
    lost = [name for name, value in row.values.items() if getattr(config, name) != value]
    label = row.label
    if row.of_improvements:
        for name in lost:
            label = label.replace(f" + {name}", "")
        lost = [name for name in lost if name not in IMPROVEMENTS]
    problems = [
        (f"{flag(name)} {row.values[name]} has no effect", "leave it out of the grid") for name in lost
    ]
    return GridRow(label, replace(row, label=label).slug, config), problems


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
    """Rows that are the same run, or that would share a folder: (fact, way out) pairs."""
    problems = []
    for place, row in enumerate(rows):
        for other in rows[:place]:
            if row.slug == other.slug or row.config == other.config:
                problems.append((f"rows '{other.label}' and '{row.label}' are the same", "leave one out"))
    return problems


def open_grid(
    folder: Path | None,
    plan: str,
    rows: Sequence[GridRow],
    seeds: Sequence[int],
    evaluate: EvalConfig,
    command: str,
) -> Grid:
    """A new grid, or one that is there and has the same rows; it may have other seeds and test tasks.

    `folder`: None for the one under runs/ that belongs to these settings. Raises SettingsError where the
    folder has rows with other settings, MamlctlError where it is something else.
    """
    path = (folder or _default_folder(plan, rows)).expanduser().absolute()
    grid = Grid(path, plan, tuple(rows), tuple(seeds), evaluate, command)
    if path.exists() and not path.is_dir():
        raise MamlctlError(f"{path} is a file, not a folder", hint="choose another --out")
    if (path / PLAN).is_file():
        if problems := _differences(load_grid(path), grid):
            raise SettingsError(problems)
    elif path.is_dir() and any(entry.name not in (CELLS, "lock") for entry in path.iterdir()):
        raise MamlctlError(f"{path} is no folder of a grid: it has no {PLAN}", hint="choose another --out")
    if problems := [problem for cell in grid.cells for problem in _cell_problems(cell)]:
        raise SettingsError(problems)
    return grid


def save_plan(grid: Grid) -> None:
    """Write plan.yaml: what a second call goes on with."""
    common = shared([asdict(row.config) for row in grid.rows])
    document = {
        "format": FORMAT,
        "plan": grid.plan,
        "command": grid.command,
        "seeds": list(grid.seeds),
        "evaluate": not_default(grid.evaluate),
        "rows": [
            {"row": row.label, "folder": row.slug, "settings": _own(row.config, common)} for row in grid.rows
        ],
        "settings": common,
    }
    (grid.folder / CELLS).mkdir(parents=True, exist_ok=True)
    write_text(grid.folder / PLAN, yaml.safe_dump(document, sort_keys=False, width=100))


def load_grid(folder: Path) -> Grid:
    """The grid of a folder. Raises MamlctlError for a folder that has none, or a damaged one."""
    path = folder.expanduser().absolute()
    try:
        document = yaml.safe_load((path / PLAN).read_text())
    except (OSError, UnicodeDecodeError) as error:
        hint = "name the folder that 'mamlctl ablate' printed"
        raise MamlctlError(f"{path} has no {PLAN} that can be read", hint=hint) from error
    except yaml.YAMLError as error:
        raise _damaged(path, "not YAML") from error
    try:
        if document["format"] != FORMAT or not document["rows"] or not document["seeds"]:
            raise ValueError(f"format {document['format']} with {len(document['rows'])} rows")
        rows = [_loaded_row(path, document["settings"], row) for row in document["rows"]]
        seeds = tuple(int(seed) for seed in document["seeds"])
        evaluate = evaluation_settings(document["evaluate"], str(path / PLAN))
        return Grid(path, str(document["plan"]), tuple(rows), seeds, evaluate, str(document["command"]))
    except (KeyError, TypeError, ValueError, AttributeError, SettingsError) as error:
        raise _damaged(path, f"{type(error).__name__} {error}".splitlines()[0]) from error


def _loaded_row(path: Path, common: Mapping[str, Any], row: Mapping[str, Any]) -> GridRow:
    values = {**common, **row["settings"]}
    if missing := FIELDS.keys() - values.keys():
        raise ValueError(f"{len(missing)} settings are missing, such as {min(missing)}")
    # Every setting is there, so no algorithm's defaults are asked for.
    return GridRow(str(row["row"]), str(row["folder"]), resolve([(str(path / PLAN), values)], list).config)


def _damaged(path: Path, why: str) -> MamlctlError:
    return MamlctlError(f"{path / PLAN} is damaged: {why}", hint="give the plan again, with another --out")


def working_on(grid: Grid) -> AbstractContextManager[None]:
    """Be the one who fills the grid's cells. Raises MamlctlError if another process is."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    return one_writer(grid.folder, "folder")


def _default_folder(plan: str, rows: Sequence[GridRow]) -> Path:
    """One folder for the same settings, so that the same command finds what it began."""
    first = complete(rows[0].config)
    told = [[row.label, lasting(row.config)] for row in rows]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:6]
    ways = f"{first.ways}w" if first.ways > 1 else ""
    return Path("runs") / f"{Path(first.dataset).name}-{ways}{first.shots}s-{plan}-{digest}"


def _differences(there: Grid, wanted: Grid) -> list[Problem]:
    """Why the grid that is there cannot take the rows that are wanted: (fact, way out) pairs."""
    way = "choose another --out, or the settings of the one that is there"
    old = {row.label: row.config for row in there.rows}
    if list(old) != [row.label for row in wanted.rows]:
        fact = f"{there.folder} has the rows of {there.plan} ({len(old)}), not of {wanted.plan}"
        return [(f"{fact} ({len(wanted.rows)})", way)]
    changed: dict[tuple[str, Any, Any], list[str]] = {}
    for row in wanted.rows:
        before, now = lasting(old[row.label]), lasting(row.config)
        for key in now:
            if before[key] != now[key]:
                changed.setdefault((key, now[key], before[key]), []).append(row.label)
    everywhere = len(wanted.rows)
    return [
        (
            f"{flag(key)} is {now}{'' if len(labels) == everywhere else f' for {labels[0]}'}, "
            f"but {there.folder} has {before}",
            way,
        )
        for (key, now, before), labels in changed.items()
    ]


def _cell_problems(cell: GridCell) -> list[Problem]:
    """Why the run folder that is there is not this cell's: (fact, way out) pairs."""
    if not (cell.folder / CONFIG).is_file():
        return []
    there, wanted = asdict(open_run(cell.folder).config), asdict(cell.config)
    way = "choose another --out, or move that folder away"
    return [
        (f"{cell.folder} was trained with {key} {there[key]}, not {wanted[key]}", way)
        for key in wanted
        if key not in MOVABLE and there[key] != wanted[key]
    ][:3]


def _own(config: TrainConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in common}


def not_default(evaluate: EvalConfig) -> dict[str, Any]:
    """What of a test is not as it always is, but for where it runs."""
    return {
        item.name: getattr(evaluate, item.name)
        for item in fields(evaluate)
        if item.name not in HERE and getattr(evaluate, item.name) != item.default
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
