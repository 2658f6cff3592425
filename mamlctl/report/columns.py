"""The columns of a table of runs: an entry of COLUMNS is a column in every form of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from mamlctl.core import formatting
from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import Model
from mamlctl.core.problems import nearest
from mamlctl.report import column_texts as texts
from mamlctl.report.column_texts import RECALLED
from mamlctl.report.table import Row, Score, Table

Value = float | str | None
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """What people read in a column, what programs read, and how each form treats it.

    Every function gets the table, with its rows in the order in which they are shown, or one of its rows.
    """

    key: str  # names the column in --sort and in the page's classes
    head: str | Callable[[Table], str]
    text: Callable[[Table, Row], str]  # "" where there is nothing to say
    value: Callable[[Row], Value] = lambda row: None  # the fact behind the text, in full
    sort: Literal["least", "best"] | None = None  # the values that come first; None: --sort does not offer it
    baseline_value: Value = None  # where --sort puts a baseline that has no value
    legend: str | Callable[[Table], str] = ""  # a sentence below the table
    notes: Callable[[Table], Sequence[str]] = lambda table: ()  # below all legends: what signs stand for
    drop_rank: int | None = 0  # narrow terminals leave out the least first; None: never
    is_always_shown: bool = False  # even where no row has a text
    is_score: bool = False  # scores stand side by side, so that a row without any can say why across them
    field: str | None = ""  # of the value in files; "": the key; None: fields of another column hold it
    csv: Callable[[Table, Row], Fields] | None = None  # instead: fields of a CSV file
    json: Callable[[Table, Row], Fields] | None = None  # instead: fields of a row in a JSON document
    style: str | Callable[[Row], str] = ""  # in a terminal
    mark: str = ""  # behind some of the texts; numbers without it end where those with it do

    def fields_in(self, form: Literal["csv", "json"], table: Table, row: Row) -> Fields:
        """The columns of a CSV file, or the fields of a row in a JSON document, that hold this column."""
        override = self.csv if form == "csv" else self.json
        if override:
            return override(table, row)
        return {} if self.field is None else {self.field or self.key: self.value(row)}


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
    if sort is None:
        return table
    column = next(column for column in COLUMNS if column.key == sort)
    is_downwards = column.sort == "best" and table.metric == "accuracy"

    def place(row: Row) -> tuple[bool, Value]:
        value = column.value(row)
        if value is None and row.label == table.baseline:
            value = column.baseline_value
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return True, 0.0
        return False, -value if is_downwards and not isinstance(value, str) else value

    return replace(table, rows=tuple(sorted(table.rows, key=place)))


def _run_counts(table: Table, row: Row) -> Fields:
    statuses = [cell.status for cell in row.cells]
    counts = {f"runs_{status}": statuses.count(status) for status in ("finished", "diverged")}
    return {"runs": len(statuses), **counts}


def _score_fields(model: Model, score: Score | None) -> dict[str, Any]:
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


def _published_fields(table: Table, row: Row) -> Fields:
    entry = row.published[0] if row.published else None
    keys = ("score", "half_width", "source", "row", "verified")
    return {f"published_{key}": getattr(entry, key, None) for key in keys}


COLUMNS: tuple[Column, ...] = (
    Column(
        "row",
        "row",
        lambda table, row: row.label,
        lambda row: row.label,
        sort="least",
        drop_rank=None,
        is_always_shown=True,
        csv=lambda table, row: {"label": row.label, "metric": table.metric},
        json=lambda table, row: {"label": row.label, "settings": row.settings},
        style="bold",
    ),
    Column(
        "seeds", "seeds", texts.seeds_text, drop_rank=1, is_always_shown=True, field=None, csv=_run_counts
    ),
    Column("bn", "bn", texts.where_rows_differ(lambda row: row.bn), lambda row: row.bn, drop_rank=4),
    Column(
        "inner_steps",
        "inner steps",
        texts.where_rows_differ(lambda row: row.inner_steps),
        drop_rank=3,
        csv=lambda table, row: {"inner_steps": row.inner_steps, "tasks": table.tasks},
        json=lambda table, row: {"inner_steps": row.inner_steps},
    ),
    Column(
        "best",
        lambda table: f"best{texts.unit(table)}",
        lambda table, row: texts.score_text(table.metric, row.best),
        lambda row: row.best.mean if row.best else None,
        sort="best",
        legend=texts.best_legend,
        drop_rank=None,
        is_always_shown=True,
        is_score=True,
        csv=lambda table, row: _score_fields("best", row.best),
        json=lambda table, row: {"best": asdict(row.best) if row.best else None},
        style="green",
    ),
    Column(
        "sd",
        "sd",
        lambda table, row: texts.deviation_text(table.metric, row.best),
        lambda row: row.best.deviation if row.best else None,
        legend="sd: standard deviation over seeds.",
        drop_rank=7,
        is_score=True,
        field=None,
    ),
    Column(
        "ensemble",
        texts.ensemble_head,
        texts.ensemble_text,
        lambda row: row.ensemble.mean if row.ensemble else None,
        sort="best",
        drop_rank=9,
        is_score=True,
        csv=lambda table, row: _score_fields("ensemble", row.ensemble) | {"ensemble_size": row.ensemble_size},
        json=lambda table, row: {
            "ensemble": asdict(row.ensemble) if row.ensemble else None,
            "ensemble_size": row.ensemble_size,
        },
    ),
    Column(
        "difference",
        "difference",
        texts.difference_text,
        lambda row: row.best.difference.mean if row.best and row.best.difference else None,
        sort="best",
        baseline_value=0.0,
        legend=texts.difference_legend,
        drop_rank=None,
        is_score=True,
        field=None,
        style=lambda row: "bold" if row.best and row.best.is_significant else "",
        mark=" *",
    ),
    Column(
        "p",
        "p (Holm)",
        lambda table, row: texts.p_text(row.best),
        lambda row: row.best.p_holm if row.best else None,
        drop_rank=8,
        is_score=True,
        field=None,
    ),
    Column(
        "published",
        lambda table: f"published{texts.unit(table)}",
        texts.published_text,
        lambda row: row.published[0].score if row.published else None,
        sort="best",
        legend=texts.PUBLISHED_LEGEND,
        notes=texts.source_notes,
        drop_rank=10,
        csv=_published_fields,
        json=lambda table, row: {"published": [asdict(entry) for entry in row.published]},
        style="dim",
        mark=RECALLED,
    ),
    Column(
        "steps",
        "to 99 %",
        lambda table, row: "" if row.steps_to_99 is None else f"{row.steps_to_99:,g}",
        lambda row: row.steps_to_99,
        sort="least",
        legend="to 99 %: meta-steps to the first validation at 99 % of the last one's score, "
        "median over seeds.",
        drop_rank=6,
        field="steps_to_99",
    ),
    Column(
        "seconds",
        "per step",
        lambda table, row: "" if row.step_s is None else formatting.duration(row.step_s),
        lambda row: row.step_s,
        sort="least",
        legend="per step: median time of a meta-step, of the median seed.",
        drop_rank=2,
        field="step_s",
    ),
    Column(
        "diverged",
        "diverged",
        lambda table, row: str(row.divergences),
        lambda row: row.divergences,
        drop_rank=5,
        is_always_shown=True,
        field=None,
        json=lambda table, row: {"diverged": row.divergences},
        style=lambda row: "red" if row.divergences else "",
    ),
)
