"""The live view of a grid: a line of cells per row, the time left, and the losses of the running cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.text import Text

from mamlctl.core import formatting
from mamlctl.core.events import OVER, CellState, GridChanged
from mamlctl.core.literals import CellProgress, Metric
from mamlctl.display import widgets
from mamlctl.display.widgets import DIM

GAP = 2  # terminal columns between two cells of a row
SHORTEST_LABEL = 10  # terminal columns of a row's name, if even signs alone leave no room for it
LONGEST_WORD = 7  # characters of a state next to percentages, which have at most 7: '100.0 %'
# In the table of running cells: most terminal columns for a name, those of a loss with its space and of a
# validation score, and the least ones for the history of a loss.
RUNNING_LABEL = 40
LOSS = 8
VALIDATION = 12
HISTORY = 8
LONGEST_SCORES: Mapping[Metric, float] = {"accuracy": 1.0, "mse": 10.0, "return": -100.0}
ACCENT = "cyan"
SHORTEST_BAR = 10  # terminal columns

SIGNS: dict[CellProgress, tuple[str, str]]
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
# A cell is shown as fully as the width allows, from a sentence to its sign alone.
DETAILS = ("all", "validation", "score", "step", "percent", "sign")


def grid_frame(grid: GridChanged, width: int, height: int) -> list[Text]:
    """One frame: a head, a line per row, a bar, and the losses of running cells.

    If not all rows fit, those with running cells are shown.

    Args:
        grid: the state of all cells.
        width: of the frame, in columns.
        height: of the frame, in lines.
    """
    rows: dict[str, list[CellState]] = {}
    for cell in grid.cells:
        rows.setdefault(cell.row, []).append(cell)
    longest, most = max(map(len, rows)), max(map(len, rows.values()))
    detail = next((each for each in DETAILS if _fits(grid, each, most, width - longest)), DETAILS[-1])
    column = _column(grid, detail)
    label = min(longest, max(width - 4 - most * column, SHORTEST_LABEL))
    room = max((width - 4 - label) // column, 1)
    shown = _rows_shown(rows, max(height - 5, 1))
    at_a_time = f"{grid.workers} {formatting.plural(grid.workers, 'cell')} at a time"
    lines = [
        widgets.both_ends(Text(f" {grid.title}", "bold"), Text(at_a_time, DIM), width),
        Text(f" {'':{label}}  {_seed_heads(next(iter(rows.values()))[:room], column)}", DIM),
    ]
    for name in shown:
        line = Text(f" {formatting.elide_middle(name, label):<{label}}  ")
        for cell in rows[name][:room]:
            text, style = _cell_text(cell, detail, grid.metric)
            line.append(text.ljust(column), style)
        lines.append(line)
    if hidden := [cell for name, row in rows.items() if name not in shown for cell in row]:
        lines.append(Text(f" … {len(rows) - len(shown)} more rows: {_counted(hidden)}", DIM))
    if most > room:
        lines[1].append(f"… {most - room} more {formatting.plural(most - room, 'seed')}", DIM)
    lines += _grid_bar(grid, width)
    return [*lines, *_running_lines(grid, width, height - len(lines))]


def _fits(grid: GridChanged, detail: str, cells: int, width: int) -> bool:
    """Whether a row of cells fits the width."""
    return 4 + cells * _column(grid, detail) <= width


def _column(grid: GridChanged, detail: str) -> int:
    """The width of the longest text that any cell may ever have, so that columns do not move."""
    total = max(cell.total_steps for cell in grid.cells)
    score = LONGEST_SCORES[grid.metric]
    longest = [CellState("", 0, state, total, total, score) for state in SIGNS]
    return GAP + max(len(_cell_text(cell, detail, grid.metric)[0]) for cell in longest)


def _seed_heads(cells: Sequence[CellState], column: int) -> str:
    heads = [f"seed {cell.seed}" for cell in cells]
    if max(map(len, heads)) < column or len(heads) == 1:
        return "".join(head.ljust(column) for head in heads)
    return f"seeds {cells[0].seed}–{cells[-1].seed}"


def _cell_text(cell: CellState, detail: str, metric: Metric) -> tuple[str, str]:
    """The sign of a cell, its state in words and numbers with units, and the style of both."""
    sign, style = SIGNS[cell.state]
    words = "" if detail == "sign" else _state_words(cell, detail, metric)
    return f"{sign} {words}".rstrip(), style


def _state_words(cell: CellState, detail: str, metric: Metric) -> str:
    at = f"{100 * cell.step // max(cell.total_steps, 1)} %" if detail == "percent" else f"step {cell.step:,}"
    at += f" of {cell.total_steps:,}" if detail == "all" else ""
    score = "" if cell.score is None else _score(metric, cell.score)
    match cell.state:
        case "training" if cell.step:
            link = {"all": ", val ", "validation": ", val ", "score": " "}.get(detail) if score else None
            return at if link is None else f"{at}{link}{score}"
        case "training":
            return "starting" if detail != "percent" else at
        case "done":
            return score
        case "diverged" if detail in ("all", "validation"):
            return f"diverged at step {cell.step:,}"
        case "waiting" if cell.step:
            return at
    is_long = len(cell.state) > LONGEST_WORD
    return "" if detail == "percent" and is_long else cell.state  # the sign says it too


def _score(metric: Metric, value: float) -> str:
    """'93.1 %', or 'mse 0.123'."""
    text = formatting.score(metric, value, None, 1)
    return text if metric == "accuracy" else f"{metric} {text}"


def _counted(cells: Sequence[CellState]) -> str:
    """'3 cells done, 2 training'."""
    counts = Counter(cell.state for cell in cells)
    parts = [f"{counts[state]} {state}" for state in SIGNS if counts[state]]
    number, _, state = parts[0].partition(" ")
    return ", ".join([f"{number} {formatting.plural(int(number), 'cell')} {state}", *parts[1:]])


def _rows_shown(rows: dict[str, list[CellState]], room: int) -> list[str]:
    """All rows if they fit; else rows with running cells, then unfinished rows, in the table's order."""
    if len(rows) <= room:
        return list(rows)

    def rank(name: str) -> int:
        states = {cell.state for cell in rows[name]}
        return 0 if states & set(BUSY) else 1 if not states <= set(OVER) else 2

    chosen = set(sorted(rows, key=rank)[: max(room - 1, 1)])
    return [name for name in rows if name in chosen]


def _grid_bar(grid: GridChanged, width: int) -> list[Text]:
    """The progress of the grid in meta-steps, counting all of a cell that has ended; two lines if narrow."""
    total = sum(cell.total_steps for cell in grid.cells)
    done = sum(cell.total_steps if cell.state in OVER else cell.step for cell in grid.cells)
    counts = Counter(cell.state for cell in grid.cells)
    done_of_all = f"{counts['done']}/{len(grid.cells)} cells done"
    done_of_all += "".join(f", {counts[state]} {state}" for state in ("diverged", "failed") if counts[state])
    share = done / max(total, 1)
    left = f" {math.floor(100 * share)} %"
    right = f"  {formatting.clock(grid.seconds_left)} left  {done_of_all}"
    room = width - len(left) - len(right) - 2
    if room >= SHORTEST_BAR:
        return [Text.assemble(" ", widgets.bar(share, room, None, ACCENT), left, right)]
    line = Text.assemble(" ", widgets.bar(share, max(width - len(left) - 2, 1), None, ACCENT), left)
    return [line, Text(right[1:])]


def _running_lines(grid: GridChanged, width: int, room: int) -> list[Text]:
    """The per-step losses of running cells, as a table that fits the free lines; empty if there is none."""
    running = [cell for cell in grid.cells if cell.state == "training" and cell.query_losses]
    shown = running if len(running) <= room - 2 else running[: max(room - 3, 0)]
    if not shown:
        return []
    # All cells count, so that the columns do not move when another cell starts.
    label = min(max(len(_cell_name(cell)) for cell in grid.cells), RUNNING_LABEL, width // 2)
    count = max(len(cell.query_losses) for cell in shown)
    steps = formatting.evenly_spaced(count, max((width - label - 2) // LOSS, 1))
    free = width - label - 2 - len(steps) * LOSS
    validation = VALIDATION if free >= VALIDATION + HISTORY + 2 else 0
    recent = free - validation - 2 if free >= HISTORY + 2 else 0
    heads = "".join(f"step {step}".rjust(LOSS) for step in steps)
    heads += "validation".rjust(VALIDATION) if validation else ""
    heads += f"  history of step {count - 1}" if recent > 16 else "  history" if recent else ""
    what = "mean return" if grid.metric == "return" else "query loss"
    lines = [
        widgets.rule("Running cells", f"{what} after each inner step", width),
        Text(f" {'':{label}}{heads}", DIM),
    ]
    for cell in shown:
        line = Text(f" {formatting.elide_middle(_cell_name(cell), label):<{label}}")
        for step in steps:
            text = ""
            if step < len(cell.query_losses):
                text = _short_loss(formatting.reported(grid.metric, cell.query_losses[step]))
            line.append(text.rjust(LOSS), widgets.step_colour(step, count))
        if validation:
            score = "–" if cell.score is None else formatting.score(grid.metric, cell.score, None, 1)
            line.append(score.rjust(VALIDATION))
        if recent:
            history = [formatting.reported(grid.metric, loss) for loss in cell.loss_history[-recent:]]
            line.append(f"  {widgets.spark(history)}", DIM)
        lines.append(line)
    if hidden := len(running) - len(shown):
        lines.append(Text(f" … {hidden} more running {formatting.plural(hidden, 'cell')}", DIM))
    return [Text(""), *lines] if len(lines) < room else lines


def _cell_name(cell: CellState) -> str:
    return f"{cell.row}, seed {cell.seed}"


def _short_loss(loss: float) -> str:
    """A loss with three decimals, in at most seven characters even if it explodes."""
    return f"{loss:.3f}" if abs(loss) < 1000 or not math.isfinite(loss) else f"{loss:.1e}"


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
    score = "" if cell.score is None else f"  {_score(grid.metric, cell.score)}"
    line = f"{_cell_name(cell)}: {cell.state}"
    if cell.state not in OVER:
        return line
    return f"{line}{score}  {ended}/{len(grid.cells)} cells ended, {formatting.clock(grid.seconds_left)} left"
