"""A table of runs as text: its columns, its rows in order, and the notes that a reader needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mamlctl.core import formatting
from mamlctl.report import columns
from mamlctl.report.column_texts import resolve
from mamlctl.report.columns import Column
from mamlctl.report.table import Cell, Row, Table


@dataclass(frozen=True)
class RenderedRow:
    """A row of the table as text."""

    row: Row
    texts: Mapping[str, str]  # by the column's key
    missing_reason: str  # why the row has no score; "" if it has one


@dataclass(frozen=True)
class RenderedTable:
    """A whole table as text."""

    columns: tuple[Column, ...]
    heads: Mapping[str, str]  # by the column's key
    rows: tuple[RenderedRow, ...]
    notes: Mapping[str, Sequence[str]]  # footnotes, by the column's key
    remarks: tuple[str, ...]  # how each unfinished run ended

    @property
    def score_keys(self) -> list[str]:
        """The keys of the score columns, from left to right."""
        return [column.key for column in self.columns if column.is_score]

    def across(self, row: RenderedRow) -> Iterator[tuple[Column, str, int]]:
        """The cells of a row from left to right.

        Yields:
            A column, its text, and 0; in a row without scores, one cell for all score columns: the first of
            them, the reason, and how many columns it spans.
        """
        score_keys = self.score_keys
        for column in self.columns:
            if not (row.missing_reason and column.is_score):
                yield column, row.texts[column.key], 0
            elif column.key == score_keys[0]:
                yield column, row.missing_reason, len(score_keys)

    def lines(self) -> list[list[str]]:
        """The heads, then each row's texts."""
        keys = [column.key for column in self.columns]
        return [[self.heads[key] for key in keys], *([row.texts[key] for key in keys] for row in self.rows)]


def render_table(table: Table, sort: str | None = None) -> RenderedTable:
    """Render the columns that have a text in any row, sorted by a column or in the plan's order.

    Raises:
        SettingsError: rows cannot be sorted by the column.
    """
    ordered = columns.sorted_table(table, sort)
    rows = tuple(_rendered_row(ordered, row) for row in ordered.rows)
    shown = tuple(
        column
        for column in columns.COLUMNS
        if column.is_always_shown or any(row.texts[column.key] for row in rows)
    )
    heads = {column.key: resolve(column.head, table) for column in shown}
    notes = {column.key: column.notes(ordered) for column in shown}
    return RenderedTable(shown, heads, rows, notes, remarks(table))


def _rendered_row(table: Table, row: Row) -> RenderedRow:
    reason = "" if row.best or row.ensemble else missing_reason(row)
    texts = {column.key: column.text(table, row) for column in columns.COLUMNS}
    if reason:
        first_score = next(column.key for column in columns.COLUMNS if column.is_score)
        texts[first_score] = reason
    on_one_line = {key: " ".join(formatting.strip_controls(text).split()) for key, text in texts.items()}
    return RenderedRow(row, on_one_line, reason)


def missing_reason(row: Row) -> str:
    """Why a row has no score: 'diverged at meta-step 40, 52; 1 missing'."""
    steps = sorted({cell.diverged_at for cell in row.cells if cell.diverged_at is not None})
    reasons = [f"diverged at meta-step {', '.join(map(str, steps))}"] if steps else []
    statuses = [cell.status for cell in row.cells if cell.diverged_at is None]
    for status in dict.fromkeys(statuses):
        name = "not tested" if status == "finished" else status
        reasons.append(name if len(row.cells) == 1 else f"{statuses.count(status)} {name}")
    return formatting.strip_controls("; ".join(reasons) or "missing")


def remarks(table: Table) -> tuple[str, ...]:
    """One line per row and way in which its unfinished runs ended, and one line for all missing runs."""
    seeds_by_end: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        for cell in row.cells:
            if cell.status not in ("finished", "missing"):
                seeds_by_end.setdefault((row.label, _how_it_ended(cell)), []).append(str(cell.seed))
    lines = [
        f"{label}, {formatting.plural(len(seeds), 'seed')} {', '.join(seeds)}: {end}"
        for (label, end), seeds in seeds_by_end.items()
    ]
    statuses = [cell.status for row in table.rows for cell in row.cells]
    missing = statuses.count("missing")
    if missing:
        lines.append(f"{missing} of {len(statuses)} runs {'is' if missing == 1 else 'are'} missing")
    return tuple(map(formatting.strip_controls, lines))


def _how_it_ended(cell: Cell) -> str:
    if cell.diverged_at is None:
        end = f"{cell.status} after {cell.steps} {formatting.plural(cell.steps, 'meta-step')}"
    else:
        end = f"diverged at meta-step {cell.diverged_at}"
    return f"{end}: {cell.reason}" if cell.reason else end


def head_parts(table: Table) -> list[str]:
    """What all rows share, for the line below the title."""
    seeds = sorted({cell.seed for row in table.rows for cell in row.cells})
    devices = list(dict.fromkeys(cell.device for row in table.rows for cell in row.cells if cell.device))
    bn = {row.bn for row in table.rows}
    disjoint = ", disjoint as far as possible" if table.disjoint else ""
    per_class = " per class" if table.ways > 1 else ""
    parts = [
        formatting.task(table.dataset, table.ways, table.shots),
        f"{table.queries} {formatting.plural(table.queries, 'query')}{per_class}",
        f"{table.split} split",
        f"{table.tasks:,} tasks (seed {table.eval_seed}{disjoint})",
        f"{table.label_permutations} label permutations" if table.label_permutations > 1 else "",
        f"bn {bn.pop()}" if len(bn) == 1 and bn != {"none"} else "",
        f"{formatting.plural(len(seeds), 'seed')} {' '.join(map(str, seeds))}" if seeds else "",
        f"{len(devices)} kinds of device" if len(devices) > 1 else "".join(devices),
    ]
    return [formatting.strip_controls(part) for part in parts if part]


def meanings(table: Table, shown: RenderedTable) -> list[str]:
    """The legends of the shown columns, then their footnotes."""
    legends = [resolve(column.legend, table) for column in shown.columns]
    notes = [note for column in shown.columns for note in shown.notes[column.key]]
    return [formatting.strip_controls(line) for line in (*legends, *notes) if line]


def warnings(table: Table, shown: RenderedTable) -> list[str]:
    """How unfinished runs ended, then the notes of the table."""
    return [*shown.remarks, *map(formatting.strip_controls, table.notes)]
