"""Figures of a table of runs: training, differences, adaptation, learnt rates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.formatting import minus_signs
from mamlctl.core.literals import HIGHER_IS_BETTER, METRIC_NAMES
from mamlctl.report.figures import rate_figures, style
from mamlctl.report.figures.style import drawing, plain
from mamlctl.report.table import Cell, Row, Score, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]
Draw = Callable[[Table, Sequence[Row], str], "Figure"]

# Rows per figure: more would not fit on a printed page.
PANELS = 24
BARS = 40
HEATS = 9
NUMBERED = 6  # inner steps: rates of more do not fit into a third of a page

REACH = 3.0  # outer intervals are cut off at this many times the range of the inner ones

CAPTIONS = {  # below each kind of figure
    "training": "Line: mean over the finished seeds; band: from their lowest to their highest score. "
    "The baseline is grey in every panel.",
    "differences": "A row to the right of zero has a higher {score} than the baseline. Thick: interval for "
    "new tasks and these trained models; thin: for new seeds as well, which needs at least two seeds. "
    "Arrow: the interval continues beyond the figure.",
    "adaptation": "Scores of the single best checkpoints, mean over seeds; the baseline is grey.",
    "rates": "Learnt inner learning rates (LSLR) at the end of training. Colours show the change from the "
    "initial rate, in all panels on one scale: purple is higher, orange is lower.",
}


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its files, and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def pictures(table: Table) -> Iterator[Picture]:
    """Draw the figures that the table has numbers for; many rows are split into several figures."""
    others = [row for row in table.rows if row.label != table.baseline] or list(table.rows)
    trained = [row for row in others if any(cell.validation for cell in row.cells)]
    yield from _parts(table, "training", "Validation over meta-steps", trained, PANELS, training)
    measured = [row for row in others if _differences(row)]
    title = f"Differences from {table.baseline}"
    yield from _parts(table, "differences", title, measured, BARS, differences)
    adapted = [row for row in others if row.best and len(row.best.per_step) > 1]
    title = f"Test score after each inner step{table.per_step_words}"
    yield from _parts(table, "adaptation", title, adapted, PANELS, adaptation)
    learnt = [row for row in table.rows if mean_rates(row)]
    yield from _parts(table, "rates", "Learnt inner rates, mean over seeds", learnt, HEATS, rates)


def _parts(
    table: Table, name: str, title: str, rows: Sequence[Row], most: int, draw: Draw
) -> Iterator[Picture]:
    count = math.ceil(len(rows) / most)
    caption = CAPTIONS[name].format(score="error" if table.metric == "mse" else table.metric)
    for part in range(count):
        number, note = (f"-{part + 1}", f" ({part + 1} of {count})") if count > 1 else ("", "")
        figure = draw(table, rows[part * most : (part + 1) * most], title + note)
        yield Picture(name + number, title + note, caption, figure)


def training(table: Table, rows: Sequence[Row], title: str) -> Figure:
    """Draw a panel per row: the mean and range of validation scores over seeds, with the baseline in grey.

    Args:
        table: the whole table.
        rows: the rows to draw, which have validation scores.
        title: of the figure.
    """
    with _panels(table, rows, title, "meta-step") as (figure, axes):
        for row, ax in zip(rows, axes, strict=False):
            base = table.baseline_row
            if base is not row:
                _curve(ax, base, style.CALM, f"{table.baseline}: mean, range over seeds")
            _curve(ax, row, style.BLUE, "this row: mean, range over seeds")
            for cell in row.cells:
                if cell.status != "finished" and cell.validation:
                    _unfinished(ax, cell)
            ax.locator_params(axis="x", integer=True, nbins=4)
        _legend(figure, axes)
    return figure


def _curve(ax: Axes, row: Row, colour: str, label: str) -> None:
    steps, values_SV = curves(row)
    if len(steps):
        ax.fill_between(steps, values_SV.min(0), values_SV.max(0), color=colour, alpha=0.3, linewidth=0)
        marker = "." if len(steps) == 1 else ""  # a line through a single value would be invisible
        ax.plot(steps, values_SV.mean(0), color=colour, linewidth=1.3, marker=marker, label=plain(label))


def curves(row: Row) -> tuple[Floats, Floats]:
    """The meta-steps at which all finished runs have validations, and the scores there: seeds x steps."""
    finished = [dict(cell.validation) for cell in row.cells if cell.status == "finished" and cell.validation]
    shared = sorted(set.intersection(*(set(curve) for curve in finished))) if finished else []
    values_SV = np.array([[curve[step] for step in shared] for curve in finished], dtype=np.float64)
    return np.array(shared, dtype=np.float64), values_SV


def _unfinished(ax: Axes, cell: Cell) -> None:
    steps, values = zip(*cell.validation, strict=True)
    ax.plot(steps, values, color=style.RED, linewidth=0.9, linestyle=":", label="unfinished run")
    ax.plot(steps[-1:], values[-1:], "x", color=style.RED, markersize=5)


def adaptation(table: Table, rows: Sequence[Row], title: str) -> Figure:
    """Draw a panel per row: the test score after 0, 1 ... inner steps, with the baseline in grey.

    Args:
        table: the whole table.
        rows: the rows to draw, which have a test score.
        title: of the figure.
    """
    with _panels(table, rows, title, "inner steps taken") as (figure, axes):
        base = table.baseline_row
        for row, ax in zip(rows, axes, strict=False):
            if base is not row and base.best and base.best.per_step:
                _adaptation_line(ax, base.best, style.CALM, table.baseline)
            assert row.best is not None  # pictures() passes only rows with a score
            _adaptation_line(ax, row.best, style.BLUE, "this row")
            ax.locator_params(axis="x", integer=True, nbins=5)
        _cut(figure, axes[0], [row.best.per_step for row in (*rows, base) if row.best and row.best.per_step])
        _legend(figure, axes)
    return figure


def _adaptation_line(ax: Axes, score: Score, colour: str, label: str) -> None:
    ax.plot(range(len(score.per_step)), score.per_step, ".-", color=colour, linewidth=1.3, label=plain(label))


def _cut(figure: Figure, ax: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Cut off the score before adaptation if its range would flatten all later scores."""
    before = [curve[0] for curve in curves]
    after = [value for curve in curves for value in curve[1:]]
    span = (max(after) - min(after)) or 0.01
    if len(curves[0]) > 2 and (min(after) - min(before) > span or max(before) - max(after) > span):
        ax.set_ylim(min(after) - 0.08 * span, max(after) + 0.08 * span)
        low, high = (ax.yaxis.get_major_formatter()(value) for value in (min(before), max(before)))
        note = f"before adaptation, not shown: {low if low == high else f'{low} to {high}'}"
        figure.text(0.99, 0.01, note, ha="right", color=style.DIM, fontsize=style.SMALL)


@contextmanager
def _panels(
    table: Table, rows: Sequence[Row], title: str, x_label: str
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure with a small panel per row, titled with its label, on shared axes."""
    across = min(len(rows), 3 if len(rows) <= 9 else 4)
    down = math.ceil(len(rows) / across)
    name_lines = max(len(_panel_title(row, across).splitlines()) for row in rows)
    height = 0.95 + (1.15 + 0.13 * name_lines) * down + (0.5 if down == 1 else 0)
    with drawing(style.WIDTH, height, title) as figure:
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for row, ax in zip(rows, axes.flat, strict=False):
            ax.set_title(_panel_title(row, across), fontsize=8)
            ax.grid(True)
        if table.metric == "accuracy":
            axes[0, 0].yaxis.set_major_formatter(lambda share, _=None: f"{100 * share:.4g} %")
        else:
            axes[0, 0].yaxis.set_major_formatter(lambda value, _=None: f"{value:.4g}")
        _label_lowest(axes, len(rows), x_label)
        yield figure, list(axes.flat)


def _label_lowest(axes: NDArray[np.object_], used: int, x_label: str) -> None:
    """Label the lowest used panel of each column, and hide the panels after the last row."""
    for ax in axes.flat[used:]:
        ax.set_axis_off()
    for ax in axes.flat[max(used - axes.shape[1], 0) : used]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(x_label)


def _panel_title(row: Row, across: int) -> str:
    """A row's short label, wrapped to the width of a panel."""
    label = plain(" ".join(row.short_label.split()))
    return "\n".join(textwrap.wrap(label, {1: 90, 2: 52, 3: 34}.get(across, 26))) or "?"


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    lines = {str(line.get_label()): line for ax in axes for line in ax.lines}
    figure.legend(
        handles=[line for label, line in lines.items() if label[:1] != "_"], loc="outside lower left", ncols=3
    )


def _differences(row: Row) -> list[Score]:
    return [score for score in (row.best, row.ensemble) if score and score.difference]


def differences(table: Table, rows: Sequence[Row], title: str) -> Figure:
    """Draw a forest plot of differences from the baseline, with thick inner and thin outer intervals.

    Args:
        table: the whole table.
        rows: the rows to draw, which have a difference.
        title: of the figure.
    """
    models = {"single best": [row.best for row in rows], "ensemble": [row.ensemble for row in rows]}
    models = {name: scores for name, scores in models.items() if any(s and s.difference for s in scores)}
    with drawing(style.WIDTH, 1.05 + 0.2 * len(rows), title) as figure:
        axes = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
        low, high = _range([score for scores in models.values() for score in scores])
        for (name, scores), ax in zip(models.items(), axes, strict=True):
            ax.axvline(0, color=style.DIM, linewidth=0.8)
            for place, score in enumerate(scores):
                if score and score.difference:
                    _bar(ax, place, score, (low, high))
            ax.set(title=name, xlim=(low, high), ylim=(len(rows) - 0.4, -0.6))
            ax.grid(True, axis="x")
            ax.locator_params(axis="x", nbins=6)  # ticks that depend on the width would change the layout
            ax.tick_params(axis="y", length=0)
            if table.metric == "accuracy":
                ax.xaxis.set_major_formatter(
                    lambda share, _: minus_signs(f"{100 * share:+.3g}") if share else "0"
                )
        names = ["\n".join(textwrap.wrap(plain(row.label), 48)) or "?" for row in rows]
        axes[0].set_yticks(range(len(rows)), names, color=style.INK)
        lower = "" if table.metric in HIGHER_IS_BETTER else ", lower is better"
        unit = "points" if table.metric == "accuracy" else f"{METRIC_NAMES[table.metric]}{lower}"
        for ax in axes:
            ax.set_xlabel(unit)
        figure.legend(handles=_forest_legend(), loc="outside lower left", ncols=4, fontsize=style.SMALL)
    return figure


def _range(scores: Sequence[Score | None]) -> tuple[float, float]:
    """Limits that contain zero, all inner intervals, and the outer intervals as far as REACH allows."""
    differences = [score.difference for score in scores if score and score.difference]
    inner = style.finite_values(
        np.array([[0.0] * 3, *([d.mean, d.tasks_low, d.tasks_high] for d in differences)])
    )
    outer = style.finite_values(np.array([[d.low, d.high] for d in differences]))
    span = float(np.ptp(inner)) or 0.01
    shown = np.concatenate([inner, outer.clip(inner.min() - REACH * span, inner.max() + REACH * span)])
    return float(shown.min()) - 0.05 * span, float(shown.max()) + 0.05 * span


def _bar(ax: Axes, place: int, score: Score, limits: tuple[float, float]) -> None:
    difference = score.difference
    assert difference is not None
    colour = style.BLUE if score.is_significant else style.DIM
    low, high = (value if np.isfinite(value) else np.nan for value in (difference.low, difference.high))
    ax.plot([max(low, limits[0]), min(high, limits[1])], [place] * 2, color=colour, linewidth=1.0)
    for end, limit, marker in ((low, limits[0], "<"), (high, limits[1], ">")):
        if min(max(end, limits[0]), limits[1]) == limit:  # the interval continues beyond the figure
            ax.plot(limit, place, marker, color=colour, markersize=4, clip_on=False)
    ax.plot([difference.tasks_low, difference.tasks_high], [place] * 2, color=colour, linewidth=3.2)
    filled = colour if score.is_significant else "white"
    ax.plot(difference.mean, place, "o", color=colour, markerfacecolor=filled, markersize=5, zorder=3)


def _forest_legend() -> list[Line2D]:
    from matplotlib.lines import Line2D

    empty: list[float] = []
    return [
        Line2D(empty, empty, color=style.BLUE, marker="o", linewidth=0, label="p < 0.05 after Holm"),
        Line2D(empty, empty, color=style.DIM, marker="o", mfc="white", linewidth=0, label="not significant"),
        Line2D(empty, empty, color=style.DIM, linewidth=3.2, label="95 %, these models, new tasks"),
        Line2D(empty, empty, color=style.DIM, linewidth=1.0, label="95 %, new seeds and tasks"),
    ]


def mean_rates(row: Row) -> Mapping[str, Floats]:
    """Learnt inner rates of each tensor, one per inner step, averaged over the seeds that have them."""
    learnt = [cell.rates for cell in row.cells if cell.rates]
    if not learnt:
        return {}
    return {name: np.mean([rates[name] for rates in learnt if name in rates], axis=0) for name in learnt[0]}


def rates(table: Table, rows: Sequence[Row], title: str) -> Figure:
    """Draw a heat map of learnt inner rates per row: tensors down, inner steps across, one colour scale.

    Args:
        table: the whole table.
        rows: the rows to draw, which have learnt rates.
        title: of the figure.
    """
    row_rates = [mean_rates(row) for row in rows]
    names = list(dict.fromkeys(name for rates_of in row_rates for name in rates_of))
    tensors = [values for rates_of in row_rates for values in rates_of.values()]
    steps = max(map(len, tensors))
    initial = [table.setting(row, "inner_lr") for row in rows]
    limit = rate_figures.colour_limit(
        [
            rate_figures.changes(values, start)
            for rates_of, start in zip(row_rates, initial, strict=True)
            for values in rates_of.values()
        ]
    )
    digits = rate_figures.decimals(np.concatenate(tensors), 3)
    across = min(len(rows), 3)
    down = math.ceil(len(rows) / across)
    with drawing(style.WIDTH, 1.3 + (0.45 + 0.19 * len(names)) * down, title) as figure:
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for rates_of, start, row, ax in zip(row_rates, initial, rows, axes.flat, strict=False):
            rates_LI = np.full((len(names), steps), np.nan)
            for place, name in enumerate(names):
                values = rates_of.get(name, np.zeros(0))
                rates_LI[place, : len(values)] = values
            mesh = rate_figures.heat_map(ax, rates_LI, start, limit)
            if steps <= NUMBERED or across == 1:
                rate_figures.write_rates(ax, mesh, rates_LI, digits=digits, size=7)
            ax.set_title(_panel_title(row, across), fontsize=8)
        rate_figures.label_cells(axes[0, 0], names, steps)
        _label_lowest(axes, len(rows), "inner step")
        rate_figures.draw_key(figure, mesh, list(axes.flat), initial, limit)
    return figure
