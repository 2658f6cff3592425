"""The live view of a grid: a line of cells per row, and the time left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from mamlctl.core import formatting
from mamlctl.core.events import OVER, CellState, GridChanged
from mamlctl.core.literals import Metric
from mamlctl.display import widgets
from mamlctl.display.widgets import DIM

CELL = 16  # terminal columns per cell: '◆ testing 93.1 %'
LABEL = 34  # most terminal columns for the name of a row
ACCENT = "cyan"
SHORTEST_BAR = 10  # terminal columns

SIGNS = {
    "waiting": ("·", DIM),
    "elsewhere": ("»", DIM),
    "training": ("▶", ACCENT),
    "testing": ("◆", ACCENT),
    "done": ("✓", "green"),
    "diverged": ("✗", "bold red"),
    "failed": ("!", "bold red"),
}
BUSY = ("training", "testing")


def grid_frame(grid: GridChanged, width: int, height: int) -> list[Text]:
    """One frame: a head, a line per row, and a bar; if rows do not fit, those with running cells.

    Args:
        grid: the state of all cells.
        width: of the frame, in columns.
        height: of the frame, in lines.
    """
    rows: dict[str, list[CellState]] = {}
    for cell in grid.cells:
        rows.setdefault(cell.row, []).append(cell)
    label = min(max(map(len, rows)), LABEL, width // 2)
    room = max((width - label - 4) // (CELL + 1), 1)
    shown = _rows_shown(rows, max(height - 5, 1))
    most = max(map(len, rows.values()))
    heads = "".join(f"seed {cell.seed}".ljust(CELL + 1) for cell in next(iter(rows.values()))[:room])
    lines = [
        widgets.both_ends(Text(f" {grid.title}", "bold"), Text(f"{grid.workers} at a time", DIM), width),
        Text(" " * (label + 3) + heads, DIM),
    ]
    lines += [_row_line(name, rows[name], label, room, grid.metric) for name in shown]
    if hidden := len(rows) - len(shown):
        lines.append(Text(f" … {hidden} more rows", DIM))
    if most > room:
        lines[1].append(f"… {most - room} more", DIM)
    return [*lines, *_grid_bar(grid, width)]


def _rows_shown(rows: dict[str, list[CellState]], room: int) -> list[str]:
    """All rows if they fit; else rows with running cells, then unfinished rows, in the table's order."""
    if len(rows) <= room:
        return list(rows)

    def rank(name: str) -> int:
        states = {cell.state for cell in rows[name]}
        return 0 if states & set(BUSY) else 1 if not states <= set(OVER) else 2

    chosen = set(sorted(rows, key=rank)[: max(room - 1, 1)])
    return [name for name in rows if name in chosen]


def _row_line(name: str, row: Sequence[CellState], label: int, room: int, metric: Metric) -> Text:
    line = Text(f" {formatting.elide_middle(name, label):<{label}}  ")
    for cell in row[:room]:
        sign, style = SIGNS[cell.state]
        line.append(f"{sign} {_state_text(cell, metric)}"[:CELL].ljust(CELL + 1), style)
    return line


def _state_text(cell: CellState, metric: Metric) -> str:
    score = "" if cell.score is None else formatting.score(metric, cell.score, None, 1)
    match cell.state:
        case "training":
            return f"{cell.step} {score}".strip()
        case "testing":
            return f"testing {score}".strip()
        case "done":
            return score
        case "diverged":
            return f"diverged {cell.step}"
        case "waiting" if cell.step:
            return f"at {cell.step}"
    return cell.state


def _grid_bar(grid: GridChanged, width: int) -> list[Text]:
    """The progress of the grid in meta-steps, counting all of a cell that has ended; two lines if narrow."""
    total = sum(cell.total_steps for cell in grid.cells)
    done = sum(cell.total_steps if cell.state in OVER else cell.step for cell in grid.cells)
    counts = Counter(cell.state for cell in grid.cells)
    done_of_all = f"{counts['done']}/{len(grid.cells)} done"
    done_of_all += "".join(f", {counts[state]} {state}" for state in ("diverged", "failed") if counts[state])
    share = done / max(total, 1)
    left = f" {math.floor(100 * share)} %"
    right = f"  {formatting.clock(grid.seconds_left)} left  {done_of_all}"
    room = width - len(left) - len(right) - 2
    if room >= SHORTEST_BAR:
        return [Text.assemble(" ", widgets.bar(share, room, None, ACCENT), left, right)]
    line = Text.assemble(" ", widgets.bar(share, max(width - len(left) - 2, 1), None, ACCENT), left)
    return [line, Text(right[1:])]


def changed_cells(before: GridChanged | None, now: GridChanged) -> list[str]:
    """The log lines of an event: one per cell whose state has changed; for the first event, a summary."""
    if before is None:
        ended = sum(cell.state in OVER for cell in now.cells)
        lines = [f"{now.title}: {len(now.cells)} cells, {ended} already ended, {now.workers} at a time"]
        return lines + [_log_line(cell, now) for cell in now.cells if cell.state in BUSY]
    return [
        _log_line(cell, now)
        for cell, old_cell in zip(now.cells, before.cells, strict=True)
        if cell.state != old_cell.state and cell.state != "waiting"
    ]


def _log_line(cell: CellState, grid: GridChanged) -> str:
    ended = sum(other.state in OVER for other in grid.cells)
    score = "" if cell.score is None else f"  {formatting.score(grid.metric, cell.score, None, 1)}"
    line = f"{cell.row}, seed {cell.seed}: {cell.state}"
    if cell.state not in OVER:
        return line
    return f"{line}{score}  {ended}/{len(grid.cells)} ended, {formatting.clock(grid.seconds_left)} left"
