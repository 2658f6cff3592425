"""The list of runs and tables (`compare --list`)."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import is_locked
from mamlctl.core.literals import HIGHER_IS_BETTER, ListedStatus
from mamlctl.core.metrics_rows import rows_of, steps_done
from mamlctl.core.results import ListedRun, ListedTable, RunList
from mamlctl.data.rules import metric_of
from mamlctl.data.sets.registry import has_classes
from mamlctl.experiments.grid.grid import CELLS, is_grid
from mamlctl.experiments.grid.plans import label_of
from mamlctl.experiments.runs.search import changed_at, newest_first
from mamlctl.run_folder import CONFIG, RunFolder, RunState, open_run, run_state
from mamlctl.settings.variables import runs_folder


def list_runs() -> RunList:
    """All runs and tables in the folder of runs; damaged ones are listed with what is wrong."""
    folder = runs_folder()
    runs, tables = [], []
    for path in newest_first(folder):
        if is_grid(path):
            tables.append(_listed_table(path))
        else:
            runs.append(_listed_run(path))
    return RunList(str(folder), tuple(runs), tuple(tables))


def _listed_table(path: Path) -> ListedTable:
    cells = [cell for cell in (path / CELLS).glob("*") if (cell / CONFIG).is_file()]
    finished = sum(run_state(cell).status == "finished" for cell in cells)
    changed = max(map(changed_at, [path, *cells]))
    return ListedTable(str(path), _iso(changed), len(cells), finished)


def _listed_run(path: Path) -> ListedRun:
    changed = _iso(changed_at(path))
    try:
        run, state = open_run(path), run_state(path)
        status = _listed_status(path, state)
        best = _best_validation(run)
    except (MamlctlError, OSError) as error:
        reason = error.message if isinstance(error, MamlctlError) else str(error)
        return ListedRun(str(path), "damaged", changed, reason=reason)
    config = run.config
    return ListedRun(
        run=str(path),
        status=status,
        changed=changed,
        label=label_of(config),
        dataset=config.dataset,
        ways=config.ways if has_classes(config) else None,
        shots=config.shots,
        seed=config.seed,
        step=steps_done(state.step, run.last_metrics()),
        total_steps=config.total_steps,
        metric=metric_of(config),
        best_val_score=best.get(f"val_{metric_of(config)}"),
        best_val_ci95=best.get("val_ci95"),
        reason=state.reason,
    )


def _listed_status(path: Path, state: RunState) -> ListedStatus:
    """The status of a run, whose process may have been killed before it could write one.

    Args:
        path: the run folder.
        state: its state.
    """
    if is_locked(path):
        return "running"
    if state.status is None or state.status == "running":
        return "interrupted"
    return state.status


def _best_validation(run: RunFolder) -> dict[str, Any]:
    """The row of the best validation; empty before the first one."""
    metric = metric_of(run.config)
    key, sign = f"val_{metric}", 1 if metric in HIGHER_IS_BETTER else -1
    # Few of the lines are validations, and reading the others as JSON would take most of the time.
    rows = rows_of(run.metrics(containing='"val_tasks"'), "validation")
    scored = [row for row in rows if row.get(key) is not None]
    return max(scored, key=lambda row: sign * row[key], default={})


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
