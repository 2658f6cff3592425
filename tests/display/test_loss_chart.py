"""The chart of the loss history: one logarithmic scale with readable numbers, and every curve on it."""

import itertools
import math

import pytest

from mamlctl.display.live_state import LossPoint
from mamlctl.display.loss_chart import BRAILLE, DOTS, Scale, loss_chart


def points_of(*curves, steps=None):
    """The reports of runs whose losses after 0, 1, ... inner steps follow these curves."""
    steps = range(1, len(curves[0]) + 1) if steps is None else steps
    return tuple(
        LossPoint(step, losses) for step, losses in zip(steps, zip(*curves, strict=True), strict=True)
    )


def drawn(*arguments, **more):
    return [line.plain for line in loss_chart(*arguments, **more)]


def lit(lines):
    """The dots of a chart as (column, row from the top), counted from the left of the line."""
    return {
        (2 * place + x, 4 * row + y)
        for row, line in enumerate(lines[1:-1])
        for place, character in enumerate(line)
        for x in range(2)
        for y in range(4)
        if BRAILLE <= ord(character) < BRAILLE + 256 and (ord(character) - BRAILLE) & DOTS[x][y]
    }


@pytest.mark.parametrize(("width", "height"), [(40, 3), (80, 8), (120, 16), (10, 4)])
@pytest.mark.parametrize("inner_steps", [0, 1, 5, 20])
def test_a_chart_fits_its_lines_and_columns(width, height, inner_steps):
    curves = [[3.0 / (1 + step + report) for report in range(30)] for step in range(inner_steps + 1)]
    lines = loss_chart(points_of(*curves), 1.6, 1000, width, height)
    assert len(lines) == height
    if width >= 40:
        assert max(line.cell_len for line in lines[1:]) <= width
    if width >= 60:
        assert lines[0].cell_len <= width


def test_equal_ratios_of_losses_are_equal_distances():
    scale = Scale.around([0.01, 10.0], 301)
    assert (scale.low, scale.high) == (0.01, 10.0)
    between = [scale.dot(loss) - scale.dot(10 * loss) for loss in (0.01, 0.1, 0.5, 1.0)]
    assert max(between) - min(between) <= 1  # a rounding
    assert scale.dot(scale.high) == 0
    assert scale.dot(scale.low) == 300


@pytest.mark.parametrize(
    "losses", [(0.31, 2.9957), (1.60, 1.62), (0.00012, 4.0), (1.0, 1.0), (1e-6, 1e6), ()]
)
def test_a_scale_has_readable_numbers_that_enclose_all_losses(losses):
    scale = Scale.around(losses, 32)
    assert all(scale.low <= loss <= scale.high for loss in losses)
    labels = scale.labels()
    rows = sorted(labels)
    assert len(rows) >= 2
    assert all(float(labels[above]) > float(labels[below]) for above, below in itertools.pairwise(rows))
    for row, label in labels.items():
        assert len(label.replace(".", "").lstrip("0").split("e")[0].rstrip("0")) <= 2, "two digits are enough"
        assert scale.row(float(label)) == row


def test_a_small_change_of_the_losses_does_not_change_the_scale():
    assert Scale.around([0.31, 2.7], 32) == Scale.around([0.33, 2.9], 32)


def test_all_curves_share_the_scale():
    constant = [[loss] * 20 for loss in (2.0, 0.5, 0.02)]
    lines = drawn(points_of(*constant), None, 20, 60, 12)
    scale = Scale.around([0.02, 2.0], 40)
    assert {y for _, y in lit(lines)} == {scale.dot(loss) for loss in (2.0, 0.5, 0.02)}
    for step, loss in enumerate((2.0, 0.5, 0.02)):
        assert lines[1 + scale.row(loss)].rstrip().endswith(f" step {step}")


def test_a_curve_is_connected_from_the_first_report_to_the_last():
    lines = drawn(points_of([1.0, 0.1, 3.0], steps=(1, 11, 20)), None, 20, 60, 10)
    dots = lit(lines)
    columns = sorted({x for x, _ in dots})
    assert columns == list(range(columns[0], columns[-1] + 1))
    for left, right in itertools.pairwise(columns):
        ys, neighbours = ({y for x, y in dots if x == column} for column in (left, right))
        assert min(abs(a - b) for a in ys for b in neighbours) <= 1


def test_curves_that_end_in_one_row_share_a_name():
    lines = drawn(points_of(*[[loss] * 4 for loss in (2.0, 0.5, 0.5, 0.5, 0.02)]), None, 4, 60, 12)
    assert any(line.rstrip().endswith(" steps 1–3") for line in lines)
    lines = drawn(points_of([1.0] * 4, [0.1] * 4, [1.0] * 4), None, 4, 60, 12)
    assert any(line.rstrip().endswith(" steps 0,2") for line in lines)


def test_the_level_of_chance_is_a_dotted_line():
    lines = drawn(points_of([3.0] * 4, [0.1] * 4), math.log(5), 4, 60, 12)
    (row,) = [line for line in lines[1:] if "┈┈┈" in line]
    assert lines[0].endswith("log scale · ┈ chance: 1.6094")
    assert lines.index(row) - 1 == Scale.around([0.1, 3.0, math.log(5)], 40).row(math.log(5))
    assert not any("┈" in line for line in drawn(points_of([3.0] * 4), None, 4, 60, 12))


def test_meta_steps_grow_to_the_right_and_the_axis_seldom_changes():
    def right_end(last, total):
        return drawn(points_of([1.0, 1.0], steps=(1, last)), None, total, 60, 8)[-1].split()[-1]

    assert [right_end(last, 50_000) for last in (2, 150, 201, 999, 1001, 4999)] == [
        *("2", "200", "500", "1,000", "2,000", "5,000")
    ]
    assert right_end(201, 300) == "300"
    half = drawn(points_of([1.0, 1.0], steps=(1, 1001)), None, 2000, 60, 8)
    full = drawn(points_of([1.0, 1.0], steps=(1, 2000)), None, 2000, 60, 8)
    assert len(lit(half)) == pytest.approx(len(lit(full)) / 2, abs=2)


def test_losses_that_are_not_finite_leave_no_dots_and_huge_ones_are_drawn_at_the_end():
    lines = drawn(points_of([math.nan] * 4, [math.inf] * 4), None, 4, 60, 8)
    assert not lit(lines)
    lines = drawn(points_of([1.0, 1e30, 0.0, -1.0]), None, 4, 60, 8)
    assert lit(lines)
    assert any("1e+06" in line for line in lines)


def test_a_report_may_have_fewer_inner_steps_than_the_next():
    body_only = [LossPoint(step, (4.0,)) for step in range(1, 5)]
    later = [LossPoint(step, (2.0, 1.0, 0.5)) for step in range(5, 9)]
    text = "\n".join(drawn((*body_only, *later), None, 10, 60, 12))
    for name in ("step 0", "step 1", "step 2"):
        assert name in text


def test_returns_are_drawn_as_negative_numbers_on_the_losses_scale_upside_down():
    points = points_of([20.0, 8.0, 3.0, 1.2, 0.7] * 4, [2.0] * 20)
    as_losses, as_returns = drawn(points, None, 20, 60, 12), drawn(points, None, 20, 60, 12, "return")
    assert as_returns[0].startswith(" Return history ─") and as_returns[0].endswith(" log scale")

    def labels(lines):
        return [float(line.split()[0]) for line in lines[1:-1] if "┤" in line]

    assert labels(as_losses)[0] > labels(as_losses)[-1] > 0
    assert [-label for label in reversed(labels(as_losses))] == labels(as_returns)
    usual, reversed_ = (Scale.around([0.7, 20.0], 40, metric) for metric in ("mse", "return"))
    for loss in (20.0, 2.0, 0.7):
        assert reversed_.dot(loss) == 39 - usual.dot(loss)
        assert reversed_.dot(loss) in {y for _, y in lit(as_returns)}
