"""A table of runs in a terminal: as many of its columns as fit, or a block of lines for each row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mamlctl.core import formatting
from mamlctl.report.columns import RECALLED, SCORES, RenderedRow, RenderedTable, grid, head_parts
from mamlctl.report.export import last_lines
from mamlctl.report.table import Table

GAP = 2

# What goes first where the terminal is narrow: what is alike in most rows, or told below the table too.
# Row, best and difference stay, or a row becomes a block of lines.
LEAST = ("seeds", "seconds", "inner_steps", "bn", "diverged", "steps", "sd", "p", "ensemble", "published")

STYLES = {"row": "bold", "best": "green", "published": "dim"}

NOTE_WIDTH = 110  # columns: longer lines of prose are hard to read

MARKS = {"difference": " *", "published": RECALLED}  # behind some of a column's numbers


def show_table(console: Console, table: Table, sort: str | None = None) -> None:
    """The table under its head line, above what its numbers mean; in a pipe, every column and no line cut.

    Raises SettingsError for a column that cannot be sorted by.
    """
    shown = _aligned(grid(table, sort))
    width = console.width if console.is_terminal else None
    lines = [
        Text(formatting.strip_controls(table.title), "bold"),
        *_wrapped(", ".join(head_parts(table)), width),
        Text(),
    ]
    keys, left_out = fitting(shown, width)
    lines += _rows(shown, keys) if keys else _blocks(shown, console.width)
    lines.append(Text())
    if left_out:
        names = ", ".join(shown.heads[key] for key in left_out)
        lines += _wrapped(f"no room for: {names} (a wider terminal or --csv shows them)", width)
    heads = {key: shown.heads[key] for key in keys or shown.heads}
    sources = shown.sources if "published" in heads else ()
    for told in last_lines(table, replace(shown, heads=heads, sources=sources)):
        lines += _wrapped(told, width)
    for line in lines:
        _say(console, line)


def _aligned(shown: RenderedTable) -> RenderedTable:
    """The same with room behind the numbers that have no mark, so that all numbers end in one place."""
    used = [
        (key, mark)
        for key, mark in MARKS.items()
        if any(line.cells[key].endswith(mark) for line in shown.lines)
    ]
    lines = []
    for line in shown.lines:
        cells = dict(line.cells)
        for key, mark in used:
            if cells[key] and not cells[key].endswith(mark):
                cells[key] += " " * len(mark)
        lines.append(replace(line, cells=cells))
    return replace(shown, lines=tuple(lines))


def fitting(shown: RenderedTable, width: int | None) -> tuple[list[str], list[str]]:
    """The columns that fit side by side, none if not even the first ones do, and those left out for it."""
    keys, left_out = list(shown.heads), []
    while width is not None and _wide(shown, keys) > width:
        key = next((key for key in LEAST if key in keys), None)
        if key is None:
            return [], []
        keys.remove(key)
        left_out.append(key)
    return keys, [key for key in shown.heads if key in left_out]


def _wide(shown: RenderedTable, keys: Sequence[str]) -> int:
    return sum(_widths(shown, keys).values()) + GAP * (len(keys) - 1)


def _widths(shown: RenderedTable, keys: Sequence[str]) -> dict[str, int]:
    """Columns of the terminal for each column; why a row has no score may go over all columns of scores."""
    widths = {}
    for key in keys:
        cells = [line.cells[key] for line in shown.lines if not (line.told and key == "best")]
        widths[key] = max(map(cell_len, [shown.heads[key], *cells]))
    over = [key for key in keys if key in SCORES]
    told = max((cell_len(line.told) for line in shown.lines), default=0)
    widths["best"] += max(told - sum(widths[key] + GAP for key in over) + GAP, 0)
    return widths


def _rows(shown: RenderedTable, keys: Sequence[str]) -> list[Text]:
    widths = _widths(shown, keys)
    heads = [_placed(shown.heads[key], widths[key], key) for key in keys]
    return [Text((" " * GAP).join(heads).rstrip(), "dim"), *(_row(line, widths) for line in shown.lines)]


def _row(line: RenderedRow, widths: Mapping[str, int]) -> Text:
    text = Text()
    over = [key for key in widths if key in SCORES]
    for key, width in widths.items():
        if line.told and key == "best":
            room = sum(widths[each] + GAP for each in over) - GAP
            text.append(line.told + " " * (room - cell_len(line.told)), "red")
        elif line.told and key in over:
            continue
        else:
            text.append(_placed(line.cells[key], width, key), _style(line, key))
        text.append(" " * GAP)
    text.rstrip()
    return text


def _placed(text: str, width: int, key: str) -> str:
    """Words to the left, numbers to the right."""
    spaces = " " * (width - cell_len(text))
    return text + spaces if key == "row" else spaces + text


def _style(line: RenderedRow, key: str) -> str:
    if key == "difference" and line.cells[key].endswith("*"):
        return "bold"
    return "red" if key == "diverged" and line.row.divergences else STYLES.get(key, "")


def _blocks(shown: RenderedTable, width: int) -> list[Text]:
    widest = max(cell_len(line.cells[key]) for line in shown.lines for key in shown.heads if key != "row")
    longest = min(max(map(cell_len, shown.heads.values())), max(width - widest - 2 * GAP, 0))
    lines = []
    for line in shown.lines:
        lines.append(Text(line.cells["row"], "bold"))
        for key, head in list(shown.heads.items())[1:]:
            if line.cells[key]:
                style = "red" if line.told and key == "best" else _style(line, key)
                lines.append(
                    Text.assemble((f"  {head:<{longest}}  ", "dim"), (line.cells[key].rstrip(), style))
                )
    return lines


def _wrapped(text: str, width: int | None) -> list[Text]:
    """Prose in lines of a terminal's width; in a pipe one line."""
    if width is None:
        return [Text(text)]
    return [Text(line) for line in textwrap.wrap(text, min(width, NOTE_WIDTH), subsequent_indent="  ")]


def _say(console: Console, line: Text) -> None:
    """One line as it is, with a question mark for what the console's encoding lacks."""
    known = line.plain.encode(console.encoding, "replace").decode(console.encoding)
    console.print(Text(known, line.style, spans=line.spans), soft_wrap=True, highlight=False)
