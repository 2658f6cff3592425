"""The live view of a grid in terminals of any size, and its lines in a log."""

from dataclasses import replace

import pytest

from mamlctl.core.events import CellState, GridChanged
from mamlctl.display.grid_view import SIGNS, changed_cells, grid_frame
from mamlctl.display.live_state import LiveState
from mamlctl.display.training_view import render

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
    for word in ("testing", "diverged 90", "failed 50.0 %"[:6], "elsewhere", "▶ 30 50.0 %"):
        assert word in text
    assert "1/7 done, 1 diverged, 1 failed" in text


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
    assert lines[0].startswith("row 1, seed 0: done  87.5 %")
    assert "12:34 left" in lines[0]
    assert lines[1] == "row 5, seed 0: training"


def test_a_mean_squared_error_is_not_shown_in_percent():
    text = frame_text(grid_of(2, 1, metric="mse"), 100, 30)
    assert "0.500" in text
    assert "%" not in text.replace("0 %", "").replace("1 %", "").split("\n")[3]
