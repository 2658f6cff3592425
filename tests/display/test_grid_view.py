"""The live view of a grid in terminals of any size, and its lines in a log."""

import itertools
import re
from dataclasses import replace

import pytest

from mamlctl.core.events import CellState, GridChanged
from mamlctl.display.grid_view import SIGNS, changed_cells, grid_frame
from mamlctl.display.live_state import LiveState
from mamlctl.display.training_view import render
from mamlctl.experiments.grid.plans import ORDER, improvement_rows

STATES = ("done", "training", "testing", "diverged", "failed", "waiting", "elsewhere")


def grid_of(rows, seeds, metric="accuracy"):
    cells = tuple(
        CellState(f"row {row}", seed, STATES[(row + seed) % 7], 30 * row, 3000, 0.5 if row % 2 else None)
        for row in range(rows)
        for seed in range(seeds)
    )
    return GridChanged("omniglot 5-way 1-shot, full", metric, 2, cells, 754.0)


def frame_text(grid, width, height):
    return "\n".join(line.plain for line in grid_frame(grid, width, height))


@pytest.mark.parametrize("rows", [1, 9, 64])
@pytest.mark.parametrize("seeds", [1, 3, 12])
@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (120, 30), (200, 80)])
def test_a_frame_fits_its_terminal(rows, seeds, width, height):
    lines = render(LiveState(0.0, grid=grid_of(rows, seeds)), width, height).renderables
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width
    text = "\n".join(line.plain for line in lines)
    assert "omniglot 5-way 1-shot" in text
    assert "12:34 left" in text
    shown = sum(line.plain.startswith(" row ") for line in lines)
    assert shown == rows or f"{rows - shown} more rows" in text


def test_rows_with_running_cells_are_shown_first():
    cells = [CellState(f"row {row}", 0, "done" if row < 50 else "waiting", 0, 10) for row in range(64)]
    cells[40] = replace(cells[40], state="training")
    text = frame_text(GridChanged("t", "accuracy", 1, tuple(cells), None), 80, 12)
    assert "row 40" in text
    assert "row 50" in text
    assert "row 1 " not in text


def test_every_state_has_its_sign_and_text():
    text = frame_text(grid_of(7, 1), 100, 30)
    for state in STATES:
        assert SIGNS[state][0] in text
    for word in ("testing", "diverged at step 90", "failed", "elsewhere", "▶ step 30 of 3,000, val 50.0 %"):
        assert word in text
    assert "1/7 cells done, 1 diverged, 1 failed" in text
    assert "2 cells at a time" in text


PLANS = [improvement_rows(plan, "maml++", ORDER) for plan in ("one-on", "one-off", "cumulative")]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("rows", PLANS)
@pytest.mark.parametrize("total", [90, 50_000])
def test_nothing_of_a_plan_is_cut_off(rows, seeds, width, height, total):
    numbers = itertools.count()
    cells = tuple(
        CellState(row.label, seed, STATES[next(numbers) % 7], total // 3, total, 1.0)
        for row in rows
        for seed in range(seeds)
    )
    grid = GridChanged("omniglot 20-way 1-shot, cumulative", "accuracy", 2, cells, 300_000.0)
    lines = [line.plain for line in grid_frame(grid, width, height - 1)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for row in rows:
        (line,) = [line for line in lines if line.startswith(f" {row.label}  ")]
        assert sum(map(line.count, "·»▶◆✓✗!")) == seeds
    for seed in range(seeds):
        assert f"seed {seed}" in text or f"seeds 0–{seeds - 1}" in text


def test_columns_do_not_move_while_cells_train():
    def columns(step, state="training", score=None):
        cells = [CellState(f"row {row}", seed, "waiting", 0, 12_345) for row in range(2) for seed in range(3)]
        cells[0] = replace(cells[0], state=state, step=step, score=score)
        lines = frame_text(GridChanged("t", "accuracy", 1, tuple(cells), None), 80, 24).splitlines()
        return [match.start() for match in re.finditer("seed|·", lines[1] + lines[3])]

    assert columns(0) == columns(9) == columns(12_345, score=1.0) == columns(12_345, "done", 1.0)


def test_numbers_have_units_also_where_little_room_is_left():
    grid, number = (
        grid_of(7, 5),
        r"step [\d,]+( of [\d,]+)?((, val)? [\d.]+ %)?|[\d.]+ %|diverged at step \d+",
    )
    for width in range(40, 160, 4):
        for line in frame_text(grid, width, 30).splitlines()[2:9]:
            for text in re.split("[·»▶◆✓✗!]", line)[1:]:
                assert re.fullmatch(rf"{number}|\D*", text.strip()), text


def running_grid(rows=4, workers=2, inner_steps=5):
    """A grid whose first cells are running and have reported."""
    cells = [CellState(f"row {row}", 0, "waiting", 0, 3000) for row in range(rows)]
    for number in range(workers):
        cells[number] = replace(
            cells[number],
            state="training",
            step=120,
            score=0.9,
            query_losses=tuple(2.0 / (1 + step + number) for step in range(inner_steps + 1)),
            loss_history=tuple(1.0 / (1 + report) for report in range(50)),
        )
    return GridChanged("t", "accuracy", workers, tuple(cells), None)


def test_the_losses_of_running_cells_fill_the_free_lines():
    lines = frame_text(running_grid(), 80, 23).splitlines()
    table = lines[lines.index("") :]
    assert table[1].startswith(" Running cells ──") and table[1].endswith("query loss after each inner step")
    heads, *rows = [" ".join(line.split()) for line in table[2:]]
    assert heads == "step 0 step 1 step 2 step 3 step 4 step 5 history"
    assert rows[0].startswith("row 0, seed 0 2.000 1.000 0.667 0.500 0.400 0.333 ")
    assert rows[1].startswith("row 1, seed 0 1.000 0.667 0.500 0.400 0.333 0.286 ")
    assert len(table) == 5
    wide = frame_text(running_grid(), 120, 39)
    assert re.search("step 5 +validation +history of step 5", wide)
    assert re.search(r"0\.333 +90\.0 % +[▁▂▃▄▅▆▇█]{20}", wide)


@pytest.mark.parametrize("inner_steps", [0, 1, 5, 20])
@pytest.mark.parametrize("workers", [1, 8, 40])
@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 23), (120, 39)])
def test_the_table_of_running_cells_fits_and_counts_what_it_leaves_out(workers, inner_steps, width, height):
    lines = frame_text(running_grid(40, workers, inner_steps), width, height).splitlines()
    assert len(lines) <= height
    if width >= 80:
        assert max(map(len, lines)) <= width
    if (width, height) == (120, 39) and workers == 8:
        assert "Running cells" not in "\n".join(lines), "no line is free"
    lines = frame_text(running_grid(9, min(workers, 9), inner_steps), width, 24).splitlines()
    shown = sum(", seed 0" in line for line in lines)
    hidden = min(workers, 9) - shown
    assert shown > 0
    assert not hidden or f" … {hidden} more running cell" in lines[-1]


def test_a_running_cell_without_a_report_is_starting():
    cell = CellState("maml", 0, "training", 0, 3000)
    assert "▶ starting" in frame_text(GridChanged("t", "accuracy", 1, (cell,), None), 80, 24)


def test_a_log_reports_each_change_once():
    before = grid_of(7, 1)
    first = changed_cells(None, before)
    assert "7 cells, 3 already ended, 2 at a time" in first[0]
    assert changed_cells(before, before) == []
    cells = list(before.cells)
    cells[1] = replace(cells[1], state="done", score=0.875)
    cells[5] = replace(cells[5], state="training")
    lines = changed_cells(before, replace(before, cells=tuple(cells)))
    assert len(lines) == 2
    assert lines[0].startswith("row 1, seed 0: done  87.5 %  4/7 cells ended")
    assert "12:34 left" in lines[0]
    assert lines[1] == "row 5, seed 0: training"


def test_a_mean_squared_error_is_not_shown_in_percent():
    text = frame_text(grid_of(2, 1, metric="mse"), 100, 30)
    assert "mse 0.500" in text
    assert "%" not in text.replace("0 %", "").replace("1 %", "").split("\n")[3]
