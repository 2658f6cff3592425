"""Figures of regression tasks from a table: curves through the examples, or predicted against true values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mamlctl.report.figures import style
from mamlctl.report.figures.style import Numbers, drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER = "before adaptation", "after adaptation"


@dataclass(frozen=True)
class Fit:
    """One target of a task with a single input: its examples, and what is predicted at every `x`."""

    title: str
    support_x: Numbers
    support_y: Numbers
    query_x: Numbers
    query_y: Numbers  # NaN if unknown
    x: Numbers
    before: Numbers
    after: Numbers
    mse: float  # of the queries after adaptation; NaN if their values are unknown


@dataclass(frozen=True)
class Agreement:
    """One target of tasks with several inputs: the true values of the queries, and the predicted ones."""

    title: str
    truth: Numbers
    before: Numbers
    after: Numbers
    mse: float  # after adaptation


def fits(rows: Sequence[Sequence[Fit]], names: tuple[str, Sequence[str]], title: str) -> Figure:
    """Draw support set, query set and prediction of each task.

    Args:
        rows: the panels, a row for each task.
        names: of the input, and of the target in each column.
        title: of the figure.
    """
    with drawing(_width(len(rows[0])), 0.75 + 2.0 * len(rows), title) as figure:
        axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for fit, target, ax in zip(row, names[1], row_axes, strict=True):
                _draw_fit(ax, fit)
                ax.set(xlabel=plain(names[0]), ylabel=plain(target))
        _legend(figure, axes[0][0])
    return figure


def _draw_fit(ax: Axes, fit: Fit) -> None:
    ax.plot(fit.x, fit.before, ":", color=style.DIM, linewidth=1.5, label=BEFORE)
    ax.plot(fit.x, fit.after, "-", color=style.BLUE, linewidth=1.5, label=AFTER)
    known = np.isfinite(fit.query_y)
    ax.plot(
        fit.query_x[known], fit.query_y[known], "o", mfc="white", mec=style.ORANGE, ms=4.5, label="query set"
    )
    ax.plot(
        fit.support_x, fit.support_y, "o", c=style.INK, mec="white", ms=5.5, zorder=5, label="support set"
    )
    _finish(ax, fit.title, fit.mse)


def agreements(rows: Sequence[Sequence[Agreement]], targets: Sequence[str], title: str) -> Figure:
    """Draw predicted against true values of the queries of many tasks.

    Args:
        rows: the panels, a row for each model.
        targets: the name of the target in each column.
        title: of the figure.
    """
    with drawing(_width(len(rows[0])), 0.75 + 2.6 * len(rows), title) as figure:
        axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for panel, target, ax in zip(row, targets, row_axes, strict=True):
                _draw_agreement(ax, panel)
                ax.set(xlabel=plain(f"true {target}"), ylabel=plain(f"predicted {target}"))
        _legend(figure, axes[0][0])
    return figure


def _draw_agreement(ax: Axes, panel: Agreement) -> None:
    finite = style.finite_values(panel.truth)
    ends = [float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))]
    ax.plot(ends, ends, "-", color=style.CALM, linewidth=2, label="predicted = true")
    ax.plot(panel.truth, panel.before, "x", color=style.DIM, ms=3.5, mew=0.7, label=BEFORE)
    ax.plot(panel.truth, panel.after, "o", color=style.BLUE, ms=3.5, mec="white", mew=0.4, label=AFTER)
    _finish(ax, panel.title, panel.mse)


def _width(columns: int) -> float:
    return style.WIDTH if columns < 3 else 2.6 * columns


def _finish(ax: Axes, title: str, mse: float) -> None:
    ax.set_title(plain(title))
    if np.isfinite(mse):
        ax.text(1, 1.02, f"mse {mse:.3g}", transform=ax.transAxes, ha="right", fontsize=style.SMALL)
    ax.grid(True)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(handles))
