"""The folder of a grid: saving and loading its plan, and locking it for one process."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.files import contents, one_writer, write_text
from mamlctl.core.formatting import plural
from mamlctl.core.problems import Problem, flag
from mamlctl.core.user_code.references import folder_name
from mamlctl.experiments.grid.grid import (
    CELLS,
    FORMAT,
    PLAN,
    Grid,
    GridCell,
    GridRow,
    common_settings,
    is_grid,
    not_default,
)
from mamlctl.experiments.settings import fill_defaults
from mamlctl.run_folder import (
    CONFIG,
    RESUME_OVERRIDES,
    digested_settings,
    identity_settings,
    open_run,
    stored_config,
)
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.presets import yaml_errors
from mamlctl.settings.schema import TrainConfig
from mamlctl.settings.variables import runs_folder

MOST_CHARACTERS = 10_000_000  # of a plan; 64 rows have 20,000


def open_grid(
    folder: Path | None,
    plan: str,
    rows: Sequence[GridRow],
    seeds: Sequence[int],
    evaluate: EvalConfig,
    command: str,
) -> Grid:
    """A new grid, or an existing one with the same rows; seeds and test tasks may differ.

    A grid on curves from before they were compiled by default keeps its engine, unless the plan names one.

    Args:
        folder: the folder; None for the one in the folder of runs that belongs to these settings.
        plan: the name of the plan.
        rows: the rows, the baseline first.
        seeds: the seeds of every row.
        evaluate: the test of every cell.
        command: the command line that creates the grid.

    Raises:
        SettingsError: the folder contains rows or runs with other settings.
        MamlctlError: the folder contains something else.
    """
    older = [_with_older_engine(row) for row in rows]
    path = (folder or _default_folder(plan, rows)).absolute()
    if folder is None and not path.exists() and is_grid(_default_folder(plan, older)):
        path = _default_folder(plan, older).absolute()
    stored = load_grid(path) if is_grid(path) else None
    if stored and [row.config.engine for row in stored.rows] == [row.config.engine for row in older]:
        rows = older
    grid = Grid(path, plan, tuple(rows), tuple(seeds), evaluate, command)
    if path.exists() and not path.is_dir():
        raise MamlctlError(f"{path} is a file, not a folder", hint="choose another --out")
    if stored:
        if problems := _plan_problems(stored, grid):
            raise SettingsError(problems)
    elif path.is_dir() and any(name != CELLS for name in contents(path, PLAN)):
        raise MamlctlError(f"{path} is not a grid's folder: it has no {PLAN}", hint="choose another --out")
    if problems := [problem for cell in grid.cells for problem in _cell_problems(cell)]:
        raise SettingsError(problems)
    return grid


def save_plan(grid: Grid) -> None:
    """Write plan.yaml, from which another call can resume."""
    common = common_settings([asdict(row.config) for row in grid.rows])
    document = {
        "format": FORMAT,
        "plan": grid.plan,
        "command": grid.command,
        "seeds": list(grid.seeds),
        "evaluate": not_default(grid.evaluate),
        "rows": [
            {
                "row": row.label,
                "folder": row.slug,
                "settings": {key: value for key, value in asdict(row.config).items() if key not in common},
            }
            for row in grid.rows
        ],
        "settings": common,
    }
    (grid.folder / CELLS).mkdir(parents=True, exist_ok=True)
    write_text(grid.folder / PLAN, yaml.safe_dump(document, sort_keys=False, width=100))


def load_grid(folder: Path) -> Grid:
    """Load the grid of a folder. Raises MamlctlError if the plan is missing or damaged."""
    path = folder.absolute()
    try:
        document = _load_yaml(path / PLAN)
    except (OSError, UnicodeDecodeError) as error:
        hint = "use the folder that 'mamlctl ablate' printed"
        raise MamlctlError(f"{path} has no readable {PLAN}", hint=hint) from error
    except yaml_errors() as error:
        raise _damaged(path, "not YAML") from error
    try:
        if document["format"] != FORMAT or not document["rows"] or not document["seeds"]:
            raise ValueError(f"format {document['format']} with {len(document['rows'])} rows")
        rows = [_loaded_row(path, document["settings"], row) for row in document["rows"]]
        seeds = tuple(int(seed) for seed in document["seeds"])
        evaluate = evaluation_settings(document["evaluate"], str(path / PLAN))
        return Grid(path, str(document["plan"]), tuple(rows), seeds, evaluate, str(document["command"]))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, SettingsError) as error:
        raise _damaged(path, f"{type(error).__name__} {error}".splitlines()[0]) from error


class _WithoutAliases(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's loader for plain values; an alias is an error, since few of them can stand for billions."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="an alias", problem_mark=mark)
        return super().compose_node(parent, index)


def _load_yaml(path: Path) -> Any:
    with path.open(encoding="utf-8") as file:
        text = file.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
    return yaml.load(text, _WithoutAliases)


def _loaded_row(path: Path, common: Mapping[str, Any], row: Mapping[str, Any]) -> GridRow:
    config = stored_config({**common, **row["settings"]}, str(path / PLAN))
    slug = str(row["folder"])
    if Path(slug).name != slug:  # a cell outside of the grid's folder
        raise ValueError(f"folder is {slug!r:.80}")
    return GridRow(str(row["row"]), slug, config)


def _damaged(path: Path, why: str) -> MamlctlError:
    return MamlctlError(f"{path / PLAN} is damaged: {why}", hint="run the plan again with another --out")


def lock_grid(grid: Grid) -> AbstractContextManager[None]:
    """Lock the grid for the block. Raises LockedError if another process is working on it."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    return one_writer(grid.folder, "folder")


def _default_folder(plan: str, rows: Sequence[GridRow]) -> Path:
    """A folder that depends only on the settings, so that the same command resumes the same grid."""
    first = fill_defaults(rows[0].config)
    content = [[row.label, digested_settings(identity_settings(row.config))] for row in rows]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]
    ways = f"{first.ways}w" if first.ways > 1 else ""
    return runs_folder() / f"{folder_name(first.dataset)}-{ways}{first.shots}s-{plan}-{digest}"


def _with_older_engine(row: GridRow) -> GridRow:
    """The row with the engine that it had before algorithms chose one."""
    if not row.default_engine:
        return row
    return replace(row, config=replace(row.config, engine=TrainConfig.engine))


def _plan_problems(stored: Grid, planned: Grid) -> list[Problem]:
    """Why the existing grid is not the planned one, as (fact, hint) pairs."""
    way = "choose another --out, or use the settings of the existing grid"
    stored_rows = {row.label: row for row in stored.rows}
    planned_labels = [row.label for row in planned.rows]
    if list(stored_rows) != planned_labels:
        if stored.plan == planned.plan:  # for example, a newer version has one more improvement
            resume = f"mamlctl ablate --resume {shlex.quote(str(stored.folder))}"
            way = f"choose another --out, or keep the old rows: {resume}"
        if len(stored_rows) != len(planned_labels):
            count = f"{len(stored_rows)} {plural(len(stored_rows), 'row')}"
            return [(f"{stored.folder} has {count}, but this command plans {len(planned_labels)}", way)]
        pairs = zip(stored_rows, planned_labels, strict=True)
        old, new = next(pair for pair in pairs if pair[0] != pair[1])
        return [(f"{stored.folder} has the row '{old}', but this command plans '{new}' instead", way)]
    labels: dict[tuple[str, object, object], list[str]] = {}  # of the rows in which a setting has changed
    for row in planned.rows:
        before, now = identity_settings(stored_rows[row.label].config), identity_settings(row.config)
        for key in now:
            if before[key] != now[key]:
                labels.setdefault((key, now[key], before[key]), []).append(row.label)
    problems = []
    for (key, now_value, before_value), changed in labels.items():
        row_note = "" if len(changed) == len(planned.rows) else f" for {changed[0]}"
        fact = f"{flag(key)} is {now_value}{row_note}, but {stored.folder} has {before_value}"
        problems.append((fact, way))
    return problems


def _cell_problems(cell: GridCell) -> list[Problem]:
    """Why the existing run folder is not this cell's, as at most three (fact, hint) pairs."""
    if not (cell.folder / CONFIG).is_file():
        return []
    stored, planned = asdict(open_run(cell.folder).config), asdict(cell.config)
    way = "choose another --out, or move the folder away"
    return [
        (f"{cell.folder} was trained with {key} {stored[key]}, not {planned[key]}", way)
        for key in planned
        if key not in RESUME_OVERRIDES and stored[key] != planned[key]
    ][:3]
