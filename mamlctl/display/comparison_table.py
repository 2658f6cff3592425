"""A table of runs in a terminal: the columns that fit, or a block of lines per row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mamlctl.core import formatting
from mamlctl.display.console import encodable
from mamlctl.report.column_texts import resolve
from mamlctl.report.columns import Column
from mamlctl.report.rendered_table import (
    RenderedRow,
    RenderedTable,
    head_parts,
    meanings,
    render_table,
    warnings,
)
from mamlctl.report.table import Table
from mamlctl.report.verdict import verdict

GAP = 2  # terminal columns between two table columns
NOTE_WIDTH = 110  # terminal columns: longer lines of prose are hard to read
MISSING = "red"  # style of the reason for a missing score


def show_table(console: Console, table: Table, sort: str | None = None) -> None:
    """Print the table with its title and its verdict above and its legends below.

    A terminal gets the columns that fit; a pipe gets every column, and no line is wrapped.

    Args:
        console: where to print.
        table: the table.
        sort: key of the column to sort by; None keeps the plan's order.

    Raises:
        SettingsError: rows cannot be sorted by the column.
    """
    whole = _aligned(render_table(table, sort))
    width = console.width if console.is_terminal else None
    shown = fitting(whole, width)
    conclusion, *limits = verdict(table)
    lines = [
        Text(formatting.strip_controls(table.title), "bold"),
        *_wrapped(", ".join(head_parts(table)), width),
        *_wrapped(conclusion, width, "bold"),
        *_wrapped(" ".join(limits), width),
        Text(),
        *(_blocks(whole, console.width) if shown is None else _side_by_side(shown)),
        Text(),
    ]
    shown = shown or whole
    left_out = [head for key, head in whole.heads.items() if key not in shown.heads]
    if left_out:
        names = ", ".join(left_out)
        lines += _wrapped(f"no room for: {names} (a wider terminal or --csv shows them)", width)
    for note in (*meanings(table, shown), *warnings(table, shown)):
        lines += _wrapped(note, width)
    for line in lines:
        _print_line(console, line)


def _aligned(shown: RenderedTable) -> RenderedTable:
    """Pad the texts that have no mark, so that all numbers of a column are aligned."""
    rooms = {
        column.key: len(column.mark)
        for column in shown.columns
        if column.mark and any(row.texts[column.key].endswith(column.mark) for row in shown.rows)
    }
    rows = []
    for row in shown.rows:
        texts = dict(row.texts)
        for column in shown.columns:
            text = texts[column.key]
            if text and column.key in rooms and not text.endswith(column.mark):
                texts[column.key] = text + " " * rooms[column.key]
        rows.append(replace(row, texts=texts))
    return replace(shown, rows=tuple(rows))


def fitting(shown: RenderedTable, width: int | None) -> RenderedTable | None:
    """Drop columns until the table fits; None if even the columns that are never dropped are too wide."""
    while width is not None and sum(_widths(shown).values()) + GAP * (len(shown.columns) - 1) > width:
        ranks = {column.key: column.drop_rank for column in shown.columns if column.drop_rank is not None}
        if not ranks:
            return None
        dropped = min(ranks, key=lambda key: ranks[key])
        columns = tuple(column for column in shown.columns if column.key != dropped)
        heads = {column.key: shown.heads[column.key] for column in columns}
        shown = replace(shown, columns=columns, heads=heads)
    return shown


def _widths(shown: RenderedTable) -> dict[str, int]:
    """The width of each column; the reason for a missing score may span all score columns."""
    widths = {key: cell_len(head) for key, head in shown.heads.items()}
    longest_reason = 0
    for row in shown.rows:
        for column, text, span in shown.across(row):
            if span:
                longest_reason = max(longest_reason, cell_len(text))
            else:
                widths[column.key] = max(widths[column.key], cell_len(text))
    widths[shown.score_keys[0]] += max(longest_reason - _reason_room(shown, widths), 0)
    return widths


def _reason_room(shown: RenderedTable, widths: Mapping[str, int]) -> int:
    """The total width of the score columns."""
    return sum(widths[key] + GAP for key in shown.score_keys) - GAP


def _side_by_side(shown: RenderedTable) -> list[Text]:
    widths = _widths(shown)
    label = shown.columns[0].key
    heads = [_padded(head, widths[key], key == label) for key, head in shown.heads.items()]
    lines = [Text((" " * GAP).join(heads).rstrip(), "dim")]
    for row in shown.rows:
        line = Text()
        for column, text, span in shown.across(row):
            width = _reason_room(shown, widths) if span else widths[column.key]
            is_left = span > 0 or column.key == label
            line.append(_padded(text, width, is_left), _style(column, row)).append(" " * GAP)
        line.rstrip()
        lines.append(line)
    return lines


def _padded(text: str, width: int, is_left: bool) -> str:
    """Align words left and numbers right."""
    spaces = " " * (width - cell_len(text))
    return text + spaces if is_left else spaces + text


def _style(column: Column, row: RenderedRow) -> str:
    return MISSING if row.missing_reason and column.is_score else resolve(column.style, row.row)


def _blocks(shown: RenderedTable, width: int) -> list[Text]:
    """Each row as a block: its label, then one line per text."""
    label, *others = shown.columns
    widest = max(cell_len(row.texts[column.key]) for row in shown.rows for column in others)
    longest = min(max(map(cell_len, shown.heads.values())), max(width - widest - 2 * GAP, 0))
    lines = []
    for row in shown.rows:
        lines.append(Text(row.texts[label.key], resolve(label.style, row.row)))
        for column in others:
            if text := row.texts[column.key].rstrip():
                head = f"  {shown.heads[column.key]:<{longest}}  "
                lines.append(Text.assemble((head, "dim"), (text, _style(column, row))))
    return lines


def _wrapped(text: str, width: int | None, style: str = "") -> list[Text]:
    """Prose wrapped to the width of a terminal; one line in a pipe, and none without a text."""
    if width is None:
        return [Text(text, style)] if text else []
    return [Text(line, style) for line in textwrap.wrap(text, min(width, NOTE_WIDTH), subsequent_indent="  ")]


def _print_line(console: Console, line: Text) -> None:
    text = Text(encodable(console.encoding, line.plain), line.style, spans=line.spans)
    console.print(text, soft_wrap=True, highlight=False)
