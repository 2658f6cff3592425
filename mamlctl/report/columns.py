"""The columns of a table of runs: an entry of COLUMNS is a column in every form of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import nearest
from mamlctl.report import column_texts as texts
from mamlctl.report.column_texts import RECALLED
from mamlctl.report.table import Row, Score, Table

Value = float | str | None


@dataclass(frozen=True)
class Column:
    """What people read in a column, what programs read, and how each form treats it.

    Every function gets the table, with its rows in the order in which they are shown, and one of its rows.
    """

    key: str  # names the column in --sort and in the page's classes
    head: str | Callable[[Table], str]
    text: Callable[[Table, Row], str]  # "" where there is nothing to say
    value: Callable[[Table, Row], Value] = lambda table, row: None  # the fact behind the text, in full
    sort: Callable[[Table, Row], Value] | None = None  # least first; None: --sort does not offer it
    legend: str | Callable[[Table], str] = ""  # a sentence below the table
    drop_rank: int | None = 0  # narrow terminals leave out the least first; None: never
    is_always_shown: bool = False  # even where no row has a text
    is_score: bool = False  # scores stand side by side, so that a row without any can say why across them
    field: str = ""  # names the value in CSV and JSON; "": as the key does
    csv: Callable[[Table, Row], Mapping[str, Any]] | None = None  # more or other fields than the value
    json: Callable[[Table, Row], Mapping[str, Any]] | None = None
    style: str | Callable[[Row], str] = ""  # in a terminal
    mark: str = ""  # behind some of the texts; numbers without it end where those with it do

    def head_of(self, table: Table) -> str:
        """The head, which may name the table's unit."""
        return self.head if isinstance(self.head, str) else self.head(table)

    def legend_of(self, table: Table) -> str:
        """What the column's numbers mean in this table."""
        return self.legend if isinstance(self.legend, str) else self.legend(table)

    def style_of(self, row: Row) -> str:
        """The style of the row's text in a terminal."""
        return self.style if isinstance(self.style, str) else self.style(row)

    def csv_fields(self, table: Table, row: Row) -> Mapping[str, Any]:
        """The columns of a CSV file that hold this one."""
        return {self.field or self.key: self.value(table, row)} if self.csv is None else self.csv(table, row)

    def json_fields(self, table: Table, row: Row) -> Mapping[str, Any]:
        """The fields of a row in a JSON document that hold this column."""
        return (
            {self.field or self.key: self.value(table, row)} if self.json is None else self.json(table, row)
        )


def check_sort(sort: str | None) -> None:
    """Raises SettingsError for a column that rows cannot be sorted by; None is the plan's order."""
    keys = [column.key for column in COLUMNS if column.sort]
    if sort is not None and sort not in keys:
        otherwise = f"columns to sort by: {', '.join(keys)}"
        raise SettingsError([(f"cannot sort by '{sort}'", nearest(sort, keys, otherwise=otherwise))])


def sorted_table(table: Table, sort: str | None) -> Table:
    """The table with its rows in the plan's order, or sorted by a column, rows without a value last.

    Raises SettingsError for a column that cannot be sorted by.
    """
    check_sort(sort)
    place = next((column.sort for column in COLUMNS if column.key == sort), None)
    if place is None:
        return table

    def last_without_value(row: Row) -> tuple[bool, Value]:
        value = place(table, row)
        is_missing = value is None or (isinstance(value, float) and math.isnan(value))
        return is_missing, 0.0 if is_missing else value

    return replace(table, rows=tuple(sorted(table.rows, key=last_without_value)))


def _best_first(table: Table, score: float | None) -> float | None:
    """A score as a number that is least for the best."""
    return score if score is None or table.metric == "mse" else -score


def _mean(score: Score | None) -> float | None:
    return None if score is None else score.mean


def _mean_difference(row: Row) -> float | None:
    return None if row.best is None or row.best.difference is None else row.best.difference.mean


def _run_counts(table: Table, row: Row) -> dict[str, int]:
    statuses = [cell.status for cell in row.cells]
    counts = {f"runs_{status}": statuses.count(status) for status in ("finished", "diverged")}
    return {"runs": len(statuses), **counts}


def _score_fields(model: str, score: Score | None) -> dict[str, Any]:
    """A score in full, for CSV."""
    from mamlctl.core.statistics import Difference  # here, so that --sort is checked without numpy

    difference, names = score.difference if score else None, [item.name for item in fields(Difference)]
    figures = {
        "seeds": len(score.per_seed) if score else 0,
        **{key: getattr(score, key, None) for key in ("mean", "ci95", "deviation")},
        **{f"difference_{key}": getattr(difference, key, None) for key in names},
        "difference_p_holm": score.p_holm if score else None,
    }
    return {f"{model}_{key}": value for key, value in figures.items()}


def _published_fields(table: Table, row: Row) -> dict[str, Any]:
    entry = row.published[0] if row.published else None
    keys = ("score", "half_width", "source", "row", "verified")
    return {f"published_{key}": getattr(entry, key, None) for key in keys}


def _published_score(table: Table, row: Row) -> float | None:
    return row.published[0].score if row.published else None


def _no_fields(table: Table, row: Row) -> dict[str, Any]:
    """Nothing of its own in a file, since another column's fields hold it."""
    return {}


COLUMNS: tuple[Column, ...] = (
    Column(
        "row",
        head="row",
        text=lambda table, row: row.label,
        sort=lambda table, row: row.label,
        drop_rank=None,
        is_always_shown=True,
        csv=lambda table, row: {"label": row.label, "metric": table.metric},
        json=lambda table, row: {"label": row.label, "settings": row.settings},
        style="bold",
    ),
    Column(
        "seeds",
        head="seeds",
        text=texts.seeds_text,
        drop_rank=1,
        is_always_shown=True,
        csv=_run_counts,
        json=_no_fields,
    ),
    Column(
        "bn",
        head="bn",
        text=lambda table, row: row.bn if len({other.bn for other in table.rows}) > 1 else "",
        value=lambda table, row: row.bn,
        drop_rank=4,
    ),
    Column(
        "inner_steps",
        head="inner steps",
        text=lambda table, row: (
            str(row.inner_steps) if len({other.inner_steps for other in table.rows}) > 1 else ""
        ),
        drop_rank=3,
        csv=lambda table, row: {"inner_steps": row.inner_steps, "tasks": table.tasks},
        json=lambda table, row: {"inner_steps": row.inner_steps},
    ),
    Column(
        "best",
        head=lambda table: f"best{texts.unit(table)}",
        text=lambda table, row: texts.score_text(table.metric, row.best),
        value=lambda table, row: _mean(row.best),
        sort=lambda table, row: _best_first(table, _mean(row.best)),
        legend=lambda table: (
            "±: 95 % interval over tasks of the seeds' mean, of these very models"
            f"{'' if table.metric == 'accuracy' else '; less is better'}."
        ),
        drop_rank=None,
        is_always_shown=True,
        is_score=True,
        csv=lambda table, row: _score_fields("best", row.best),
        json=lambda table, row: {"best": asdict(row.best) if row.best else None},
        style="green",
    ),
    Column(
        "sd",
        head="sd",
        text=lambda table, row: texts.deviation_text(table.metric, row.best),
        value=lambda table, row: row.best.deviation if row.best else None,
        legend="sd: standard deviation over seeds.",
        drop_rank=7,
        is_score=True,
        csv=_no_fields,
        json=_no_fields,
    ),
    Column(
        "ensemble",
        head=texts.ensemble_head,
        text=texts.ensemble_text,
        value=lambda table, row: _mean(row.ensemble),
        sort=lambda table, row: _best_first(table, _mean(row.ensemble)),
        drop_rank=9,
        is_score=True,
        csv=lambda table, row: {
            **_score_fields("ensemble", row.ensemble),
            "ensemble_size": row.ensemble_size,
        },
        json=lambda table, row: {
            "ensemble": asdict(row.ensemble) if row.ensemble else None,
            "ensemble_size": row.ensemble_size,
        },
    ),
    Column(
        "difference",
        head="difference",
        text=texts.difference_text,
        value=lambda table, row: _mean_difference(row),
        sort=lambda table, row: (
            0.0 if row.label == table.baseline else _best_first(table, _mean_difference(row))
        ),
        legend=texts.difference_legend,
        drop_rank=None,
        is_score=True,
        csv=_no_fields,
        json=_no_fields,
        style=lambda row: "bold" if row.best and row.best.is_significant else "",
        mark=" *",
    ),
    Column(
        "p",
        head="p (Holm)",
        text=lambda table, row: texts.p_text(row.best),
        value=lambda table, row: row.best.p_holm if row.best else None,
        drop_rank=8,
        is_score=True,
        csv=_no_fields,
        json=_no_fields,
    ),
    Column(
        "published",
        head=lambda table: f"published{texts.unit(table)}",
        text=texts.published_text,
        value=_published_score,
        sort=lambda table, row: _best_first(table, _published_score(table, row)),
        legend="published: what the source prints, at its own length of training, and its ± is not "
        f"always a 95 % interval; {RECALLED}: recalled, not verified.",
        drop_rank=10,
        csv=_published_fields,
        json=lambda table, row: {"published": [asdict(entry) for entry in row.published]},
        style="dim",
        mark=RECALLED,
    ),
    Column(
        "steps",
        head="to 99 %",
        text=lambda table, row: "" if row.steps_to_99 is None else f"{row.steps_to_99:,g}",
        value=lambda table, row: row.steps_to_99,
        sort=lambda table, row: row.steps_to_99,
        legend="to 99 %: meta-steps to the first validation at 99 % of the last one's score, "
        "median over seeds.",
        drop_rank=6,
        field="steps_to_99",
    ),
    Column(
        "seconds",
        head="per step",
        text=lambda table, row: "" if row.step_s is None else formatting.duration(row.step_s),
        value=lambda table, row: row.step_s,
        sort=lambda table, row: row.step_s,
        legend="per step: median time of a meta-step, of the median seed.",
        drop_rank=2,
        field="step_s",
    ),
    Column(
        "diverged",
        head="diverged",
        text=lambda table, row: str(row.divergences),
        value=lambda table, row: row.divergences,
        drop_rank=5,
        is_always_shown=True,
        csv=_no_fields,
        style=lambda row: "red" if row.divergences else "",
    ),
)
