"""The columns of a table of runs: each entry of COLUMNS is a column in every output format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from mamlctl.core import formatting
from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import HIGHER_IS_BETTER, Model
from mamlctl.core.problems import nearest
from mamlctl.report import column_texts as texts
from mamlctl.report.column_texts import RECALLED
from mamlctl.report.table import Row, Score, Table

Value = float | str | None
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: its text for people, its value for programs, and how each output format treats it.

    Functions of a table receive it with its rows in display order.
    """

    key: str  # names the column in --sort and in the CSS classes of the page
    head: str | Callable[[Table], str]
    text: Callable[[Table, Row], str]  # "" for an empty cell
    value: Callable[[Row], Value] = lambda row: None  # the unrounded value behind the text
    sort: Literal["least", "best"] | None = None  # the values that come first; None: not sortable
    baseline_value: Value = None  # what --sort uses for a baseline without a value
    legend: str | Callable[[Table], str] = ""  # a sentence below the table
    notes: Callable[[Table], Sequence[str]] = lambda table: ()  # footnotes, below all legends
    drop_rank: int | None = 0  # a narrow terminal drops the lowest rank first; None: never
    is_always_shown: bool = False  # even if the text of every row is empty
    is_score: bool = False  # adjacent columns, which the reason for a missing score can span
    field: str | None = ""  # of the value in files; "": the key; None: another column writes it
    csv: Callable[[Table, Row], Fields] | None = None  # replaces `field` in a CSV file
    json: Callable[[Table, Row], Fields] | None = None  # replaces `field` in a JSON document
    style: str | Callable[[Row], str] = ""  # in a terminal
    mark: str = ""  # suffix of some texts; the other texts are padded to align the numbers

    def fields_in(self, form: Literal["csv", "json"], table: Table, row: Row) -> Fields:
        """The fields of this column in a row of a CSV file or of a JSON document.

        Args:
            form: the kind of file.
            table: the whole table.
            row: the row of the table.
        """
        override = self.csv if form == "csv" else self.json
        if override:
            return override(table, row)
        return {} if self.field is None else {self.field or self.key: self.value(row)}


def check_sort(sort: str | None) -> None:
    """Check that rows can be sorted by a column; None is the plan's order.

    Raises:
        SettingsError: there is no such column, or it is not sortable.
    """
    keys = [column.key for column in COLUMNS if column.sort]
    if sort is not None and sort not in keys:
        otherwise = f"sort by one of: {', '.join(keys)}"
        raise SettingsError([(f"cannot sort by '{sort}'", nearest(sort, keys, otherwise=otherwise))])


def sorted_table(table: Table, sort: str | None) -> Table:
    """Sort the rows by a column, with rows without a value last; None keeps the plan's order.

    Raises:
        SettingsError: there is no such column, or it is not sortable.
    """
    check_sort(sort)
    if sort is None:
        return table
    column = next(column for column in COLUMNS if column.key == sort)
    is_descending = column.sort == "best" and table.metric in HIGHER_IS_BETTER

    def place(row: Row) -> tuple[bool, Value]:
        value = column.value(row)
        if value is None and row.label == table.baseline:
            value = column.baseline_value
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return True, 0.0
        return False, -value if is_descending and not isinstance(value, str) else value

    return replace(table, rows=tuple(sorted(table.rows, key=place)))


def _run_counts(table: Table, row: Row) -> Fields:
    statuses = [cell.status for cell in row.cells]
    counts = {f"runs_{status}": statuses.count(status) for status in ("finished", "diverged")}
    return {"runs": len(statuses), **counts}


def _score_fields(model: Model, score: Score | None) -> dict[str, Any]:
    from mamlctl.core.statistics import Difference  # imported here: checking --sort must not import numpy

    difference, names = score.difference if score else None, [item.name for item in fields(Difference)]
    values = {
        "seeds": len(score.per_seed) if score else 0,
        **{key: getattr(score, key, None) for key in ("mean", "ci95", "deviation")},
        **{f"difference_{key}": getattr(difference, key, None) for key in names},
        "difference_p_holm": score.p_holm if score else None,
    }
    return {f"{model}_{key}": value for key, value in values.items()}


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
        legend="to 99 %: meta-steps until validation reaches 99 % of its final score, median over seeds.",
        drop_rank=6,
        field="steps_to_99",
    ),
    Column(
        "seconds",
        "per step",
        lambda table, row: "" if row.step_s is None else formatting.duration(row.step_s),
        lambda row: row.step_s,
        sort="least",
        legend="per step: median time per meta-step, median over seeds.",
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
