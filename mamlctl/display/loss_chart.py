"""The history of the query losses: curves on one logarithmic scale, drawn in braille dots.

Policies have returns, which are minus the losses, so their scale is upside down: higher is better.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from rich.text import Text

from mamlctl.core import formatting
from mamlctl.core.literals import Metric
from mamlctl.display import widgets
from mamlctl.display.live_state import LossPoint
from mamlctl.display.widgets import DIM

CURVES = 6  # more would hide each other
DRAWN = (1e-6, 1e6)  # losses outside of this range are drawn at its ends
MARGIN = 12  # terminal columns for the names of the curves: ' steps 12–20'
BRAILLE = 0x2800  # the character without dots
DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # the bit of a dot by column, and row from the top
# The readable numbers of a decade, from few to many; scales end at those of ENDS.
ENDS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
READABLE = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), ENDS, tuple(tenth / 10 for tenth in range(10, 100)))


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis for losses, in dots from the top."""

    low: float
    high: float
    dots: int
    metric: Metric

    @classmethod
    def around(cls, losses: Sequence[float], dots: int, metric: Metric = "mse") -> Scale:
        """The scale that contains all losses; it ends at readable numbers, so that it seldom changes.

        Args:
            losses: positive and finite.
            dots: the height of the axis.
            metric: of the run; "return" for the scale of negative returns.
        """
        least, most = min(losses, default=1.0), max(losses, default=1.0)
        low = _readable(least / 10, least, ENDS)[-1]
        return cls(low, next(end for end in _readable(most, 20 * most, ENDS) if end > low), dots, metric)

    def dot(self, loss: float) -> int:
        """The dot of a loss; that of the nearest end if the loss is outside of the scale."""
        share = math.log(self.high / loss) / math.log(self.high / self.low)
        share = 1 - share if self.metric == "return" else share
        return round(min(max(share, 0.0), 1.0) * (self.dots - 1))

    def row(self, loss: float) -> int:
        """The row of characters with the dot of a loss."""
        return self.dot(loss) // 4

    def labels(self) -> dict[int, str]:
        """As many readable numbers as fit with a row between them, by row of characters."""
        for numbers in reversed(READABLE):
            ticks = _readable(self.low, self.high, numbers)
            apart = all(abs(self.row(a) - self.row(b)) > 1 for a, b in itertools.pairwise(ticks))
            if len(ticks) > 1 and apart:
                return {self.row(tick): self._label(tick) for tick in ticks}
        return {self.row(end): self._label(end) for end in (self.high, self.low)}

    def _label(self, loss: float) -> str:
        return f"{formatting.reported(self.metric, loss):g}"


def _readable(low: float, high: float, numbers: Sequence[float]) -> list[float]:
    """The numbers of all decades from `low` to `high`, in order."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    # Parsed from decimals, because products with powers of ten have rounding errors.
    every = [float(f"{number}e{decade}") for decade in decades for number in numbers]
    return [number for number in every if low <= number <= high]


@dataclass(frozen=True)
class _Curve:
    """The losses after one number of inner steps."""

    step: int
    style: str
    dots: tuple[tuple[int, int], ...]  # columns and rows of dots, one per column, from left to right


@functools.lru_cache(maxsize=1)  # most frames have the chart of the frame before
def loss_chart(
    points: tuple[LossPoint, ...],
    chance: float | None,
    total_steps: int,
    width: int,
    height: int,
    metric: Metric = "mse",
) -> tuple[Text, ...]:
    """Draw the loss after each inner step as a curve, with the losses on the left and meta-steps below.

    Args:
        points: the losses of the reports, oldest first; at least one.
        chance: the loss of guessing; None for regression.
        total_steps: meta-steps of the whole run.
        width: of the chart, in columns.
        height: of the chart, in lines: a title, at least one row of curves, and the meta-steps.
        metric: of the run; "return" for a chart of returns, which are minus the losses.
    """
    rows, count = height - 2, len(points[-1].query_losses)
    steps = formatting.evenly_spaced(count, CURVES)
    series = [_series(points, step) for step in steps]
    losses = [loss for one_series in series for _, loss in one_series]
    scale = Scale.around([*losses, *([] if chance is None else [chance])], 4 * rows, metric)
    labels = scale.labels()
    axis = max(map(len, labels.values()))
    columns = max(width - axis - 3 - MARGIN, 2)
    first, last = points[0].step, _last_step(points, total_steps)
    per_step = (2 * columns - 1) / (last - first)
    curves = [
        _Curve(
            step,
            widgets.step_colour(step, count),
            _dots([(int((at - first) * per_step), loss) for at, loss in one_series], scale),
        )
        for step, one_series in zip(steps, series, strict=True)
    ]
    cells = _drawn(curves, rows, columns)
    note = "log scale"
    if chance is not None:
        note = f"{note} · ┈ chance: {formatting.loss(chance)}"
        row_cells = cells[scale.row(chance)]
        row_cells[:columns] = [("┈", DIM) if cell[0] == " " else cell for cell in row_cells[:columns]]
    _name(cells, curves)
    lines = [widgets.rule("Return history" if metric == "return" else "Loss history", note, width)]
    for row, row_cells in enumerate(cells):
        line = Text.assemble((f" {labels.get(row, ''):>{axis}} {'┤' if row in labels else '│'}", DIM))
        for style, group in itertools.groupby(row_cells, key=itemgetter(1)):
            line.append("".join(character for character, _ in group), style)
        lines.append(line)
    start, end = f"step {first:,} ", f" {last:,}"
    rest = "─" * max(columns - len(start) - len(end), 0)
    return (*lines, Text.assemble((f" {'':>{axis}} └{start}{rest}{end}", DIM)))


def _series(points: Sequence[LossPoint], step: int) -> list[tuple[int, float]]:
    """The finite losses after an inner step, limited to what is drawn, with their meta-steps."""
    losses = [(point.step, point.query_losses[step]) for point in points if step < len(point.query_losses)]
    return [(at, min(max(loss, DRAWN[0]), DRAWN[1])) for at, loss in losses if math.isfinite(loss)]


def _last_step(points: Sequence[LossPoint], total_steps: int) -> int:
    """The meta-step at the right end: 1, 2 or 5 times a power of ten, so that it seldom changes."""
    reached = max(points[-1].step, points[0].step + 1)
    power = int(10 ** (len(str(reached)) - 1))
    rounded = next(end for end in (power, 2 * power, 5 * power, 10 * power) if end >= reached)
    return max(min(rounded, total_steps), reached)


def _dots(places: Sequence[tuple[int, float]], scale: Scale) -> tuple[tuple[int, int], ...]:
    """A dot in each column: of the mean loss in it, or on the line between its neighbours."""
    means = []
    for column, group in itertools.groupby(places, key=itemgetter(0)):
        losses = [loss for _, loss in group]
        means.append((column, scale.dot(sum(losses) / len(losses))))
    dots = means[:1]
    for (left, y_left), (right, y_right) in itertools.pairwise(means):
        slope = (y_right - y_left) / (right - left)
        dots += [(x, round(y_left + slope * (x - left))) for x in range(left + 1, right + 1)]
    return tuple(dots)


def _drawn(curves: Sequence[_Curve], rows: int, columns: int) -> list[list[tuple[str, str]]]:
    """Characters with their styles, with an empty margin; a later curve gives its style to a shared one."""
    bits = [[0] * columns for _ in range(rows)]
    styles = [[""] * columns for _ in range(rows)]
    for curve in curves:
        above = [y for _, y in curve.dots[:1]] + [y for _, y in curve.dots]
        for (x, y), before in zip(curve.dots, above, strict=False):
            # Steep parts are joined: the column also has the dots below or above its left neighbour.
            for joined in range(min(y, before + 1), max(y, before - 1) + 1):
                bits[joined // 4][x // 2] |= DOTS[x % 2][joined % 4]
                styles[joined // 4][x // 2] = curve.style
    return [
        [(chr(BRAILLE + dots) if dots else " ", style) for dots, style in zip(*row, strict=True)]
        + [(" ", "")] * MARGIN
        for row in zip(bits, styles, strict=True)
    ]


def _name(cells: list[list[tuple[str, str]]], curves: Sequence[_Curve]) -> None:
    """Write the inner steps to the right of the curves' ends; curves that end in one row share a name."""
    ends: dict[int, list[_Curve]] = {}
    for curve in curves:
        if curve.dots:
            ends.setdefault(curve.dots[-1][1] // 4, []).append(curve)
    shown = [curve.step for curve in curves]
    for row, ending in ends.items():
        steps = [curve.step for curve in ending]
        first = shown.index(steps[0])
        joined = shown[first : first + len(steps)] == steps and len(steps) > 2
        number = f"{steps[0]}–{steps[-1]}" if joined else ",".join(map(str, steps))
        name = f" {formatting.plural(len(steps), 'step')} {number}"
        start = max(curve.dots[-1][0] for curve in ending) // 2 + 1
        for place, character in enumerate(name[:MARGIN], start):
            cells[row][place] = character, ending[-1].style
