"""The results of `train` and `eval`, and the list of runs, on a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.core.literals import METRIC_NAMES
from mamlctl.core.results import EvalResult, ListedRun, ListedTable, RunList, TableScores, TrainResult
from mamlctl.display.console import say, say_table, table_fits

# The heads of the list of runs.
RUN_HEADS = ["run", "algorithm", "data", "status", "step", "best", "when"]
TABLE_HEADS = ["table", "runs", "finished", "when"]


def show_train_result(console: Console, result: TrainResult) -> None:
    """Print how training ended, and the commands to run next."""
    why = f" ({result.reason})" if result.reason else ""
    run = shlex.quote(result.run)
    say(console, (f"{result.status}{why}", "bold"), f"  {result.run}")
    took = formatting.duration(result.seconds)
    say(console, f"steps  {result.step:,} of {result.total_steps:,} meta-steps in {took}")
    if result.best_val_score is None:
        say(console, "best   no validation yet")
    else:
        score = formatting.score(result.metric, result.best_val_score, result.best_val_ci95)
        tasks = f"{result.val_tasks} validation {formatting.plural(result.val_tasks, 'task')}"
        bn = "" if result.bn == "none" else f", {result.bn}"
        where = f" after epoch {result.best_epoch} ({tasks}{bn})"
        say(console, "best   ", (score, "bold green"), where)
    if result.status == "finished" and result.chance is not None and result.includes_chance:
        what = "the interval includes it; check --inner-lr and --meta-lr, or train longer"
        say(console, ("chance ", "yellow"), f"{formatting.percent(result.chance, 2)}: {what}")
    if result.status == "interrupted":
        say(console, "next   ", (f"mamlctl train --resume {run}", "cyan"))
    say(console, "test   ", (f"mamlctl eval {run}", "cyan"))


def show_eval_result(console: Console, result: EvalResult) -> None:
    """Print one row per model, and the scores after each inner step if they were measured.

    An ensemble of one is the best model, and has no row beside it.
    """
    shown = tuple(row for row in result.rows if row.kind == "best" or len(row.epochs) > 1)
    result = replace(result, rows=shown or result.rows)
    first = result.rows[0]
    per_class = " per class" if first.ways > 1 else ""
    queries = f"{first.queries} {formatting.plural(first.queries, 'query')}{per_class}"
    task = formatting.task(result.dataset, first.ways, first.shots)
    say(console, (task, "bold"), f", {queries}  {result.algo}  {result.run}")
    for note in result.notes:
        say(console, note)
    say(console)
    score_name = METRIC_NAMES[first.metric]
    losses = {} if result.loss is None else result.loss.means
    head = [] if result.loss is None else [result.loss.loss]
    bn = [] if first.bn == "none" else ["bn"]
    table = [["model", score_name, *head, "tasks", "split", *bn, "inner steps"]]
    for row in result.rows:
        score = formatting.score(row.metric, row.score, row.ci95)
        tasks = row.tasks if result.table is None else result.table.tasks
        loss = [formatting.score("mse", *losses[row.model])] if losses else []
        mode = [row.bn] if bn else []
        table.append([row.model, score, *loss, str(tasks), row.split, *mode, str(row.inner_steps)])
    say_table(console, table, left=2 + len(head))
    say(console)
    if result.table is not None and result.table.standardised:
        _show_targets(console, result.table)
        say(console)
    if len(first.per_step) > 1:
        _show_per_step(console, result, score_name)
        say(console)
    for row in result.rows:
        if row.epochs:
            epochs = formatting.plural(len(row.epochs), "epoch")
            say(console, f"{row.model}: {epochs} {', '.join(map(str, row.epochs))}")
    chance = f"; chance: {formatting.percent(1 / first.ways, 2)}" if first.metric == "accuracy" else ""
    say(
        console,
        f"intervals: 95 % over tasks{chance}; {formatting.duration(result.seconds)}; "
        f"written to {result.folder}",
    )
    for picture in result.pictures:
        say(console, f"picture  {picture}")


def _show_targets(console: Console, table: TableScores) -> None:
    """Print the error of each target in its own unit; the score above is their mean after standardisation."""
    say(console, ("mean squared error of each target, in its own unit", "bold"))
    models = list(table.errors)
    rows = [["target", *models]]
    for of_target in zip(*table.errors.values(), strict=True):
        errors = [formatting.score("mse", error.mse, error.ci95) for error in of_target]
        rows.append([formatting.one_line(of_target[0].target), *errors])
    say_table(console, rows, left=1)
    say(console, "the score is their mean, each divided by the variance of the target in training")


def show_runs(console: Console, listed: RunList) -> None:
    """Print a line per run and per table, what is damaged, or how to get a first run."""
    if not (listed.runs or listed.tables):
        say(console, f"no runs in {listed.folder}; train one with: ", ("mamlctl train --preset demo", "cyan"))
        return
    if listed.runs:
        _say_records(console, RUN_HEADS, [*map(_run_cells, listed.runs)])
    if listed.tables:
        _say_records(console, TABLE_HEADS, [*map(_table_cells, listed.tables)])
    for run in listed.runs:
        if run.status == "damaged":
            say(console, (run.reason, "red"))


def _say_records(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, or two lines per row if the terminal is too narrow for it."""
    if table_fits(console, [heads, *rows]):
        say_table(console, [heads, *rows], left=len(heads))
        return
    for name, *cells in rows:
        say(console, (name, "bold"))
        say(console, "  ", "  ".join(cell for cell in cells if cell != "-"))


def _table_cells(table: ListedTable) -> list[str]:
    """The cells of a table in the list of runs."""
    return [table.folder, str(table.runs), str(table.finished), _when(table.changed)]


def _run_cells(run: ListedRun) -> list[str]:
    """The cells of a run in the list of runs; "-" for what is not known."""
    data = "-" if run.dataset is None else formatting.task(run.dataset, run.ways or 1, run.shots or 0)
    step = "-" if run.step is None else f"{run.step:,}/{run.total_steps:,}"
    best = "-"
    if run.metric is not None and run.best_val_score is not None:
        best = formatting.score(run.metric, run.best_val_score, run.best_val_ci95, 1)
    return [run.run, run.label or "-", data, run.status, step, best, _when(run.changed)]


def _when(iso: str) -> str:
    """The local time of an ISO time, to the minute."""
    return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M}"


def _show_per_step(console: Console, result: EvalResult, score_name: str) -> None:
    """Print the scores after each inner step, and on which tasks if not on all of them."""
    first = result.rows[0]
    unit = " in %" if first.metric == "accuracy" else ""
    tasks = "" if first.per_step_tasks == first.tasks else f", first {first.per_step_tasks} tasks"
    say(console, (f"{score_name}{unit} after each inner step{tasks}", "bold"))
    # Split the columns into blocks, because a terminal would wrap longer lines.
    longest = max(len(row.model) for row in result.rows)
    columns = max((console.width - longest) // 8, 1) if console.is_terminal else len(first.per_step)
    for begin in range(0, len(first.per_step), columns):
        steps = range(begin, min(begin + columns, len(first.per_step)))
        table = [["model", *map(str, steps)]]
        scale = 100 if first.metric == "accuracy" else 1
        table += [[row.model, *(f"{scale * row.per_step[at]:.2f}" for at in steps)] for row in result.rows]
        say_table(console, table, left=1, min_width=6)
