"""Figures of single runs from plain arrays and numbers; only drawing one imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mamlctl.core import formatting
from mamlctl.report.figures import rate_figures, style
from mamlctl.report.figures.style import Numbers, drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = tuple[str, str | tuple[float, tuple[float, ...]]]  # colour; dashes by name, or their lengths

EARLY: tuple[Look, ...] = ((style.ORANGE, "--"), (style.GREEN, "-."), (style.PURPLE, (0, (5, 1, 1, 1, 1, 1))))
BINS = 60  # per histogram
CROWDED = 12  # inner steps: with more, two digits of a rate do not fit

# Inches.
CELL = 0.45  # an image's width including the space next to it
EDGE = 0.06  # that space
GAP = 0.2  # from the support set to the queries
STRIP = 0.17  # height of the text below a query
TASK_HEAD = 0.5
FOLD = 10  # classes per block, below each other
QUERIES_SHOWN = 60  # per task
NAME = 18  # characters of a class name


@dataclass(frozen=True)
class Curve:
    """A learner's predictions after some inner steps."""

    steps: int
    y: Numbers
    mse: float


@dataclass(frozen=True)
class Panel:
    """One regression task from one start; `truth` and the `y` of each curve are values at `x`."""

    title: str
    x: Numbers
    truth: Numbers
    support_x: Numbers
    support_y: Numbers
    curves: Sequence[Curve]


def regression(panels: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Draw tasks in rows and starts in columns, with predictions after some inner steps."""
    taken = sorted({curve.steps for row in panels for panel in row for curve in panel.curves})
    between = [steps for steps in taken[:-1] if steps > 0]
    looks: dict[int, Look] = dict.fromkeys(taken, (style.BLUE, "-"))
    looks[0] = style.DIM, ":"
    looks |= {steps: EARLY[place % len(EARLY)] for place, steps in enumerate(between)}
    with drawing(style.WIDTH, 0.75 + 2.0 * len(panels), title) as figure:
        axes = figure.subplots(len(panels), len(panels[0]), sharex=True, sharey="row", squeeze=False)
        for row, row_axes in zip(panels, axes, strict=True):
            for panel, ax in zip(row, row_axes, strict=True):
                _panel(ax, panel, taken, looks)
            row_axes[0].set_ylim(*_heights(row))
        lines = {line.get_label(): line for ax in axes.flat for line in ax.lines}
        figure.legend(
            handles=list(lines.values()),
            title="The task, and its curve as predicted",
            alignment="left",
            loc="outside lower left",
            ncols=min(len(lines), 6),
        )
    return figure


def _heights(row: Sequence[Panel]) -> tuple[float, float]:
    """A y range for the truth and all curves; curves far outside the truth's range are cut off."""
    truth = style.finite_values(*(part for panel in row for part in (panel.truth, panel.support_y)))
    drawn = style.finite_values(truth, *(curve.y for panel in row for curve in panel.curves))
    span = float(np.ptp(truth)) or 1.0
    low, high = max(drawn.min(), truth.min() - 0.6 * span), min(drawn.max(), truth.max() + 0.6 * span)
    return float(low - 0.06 * span), float(high + 0.06 * span)


def _panel(ax: Axes, panel: Panel, taken: Sequence[int], looks: Mapping[int, Look]) -> None:
    ax.plot(panel.x, panel.truth, color=style.CALM, linewidth=4.5, label="truth")
    # The errors are above the axes, where they cover no data.
    ax.text(0, 1.02, "steps\nmse", transform=ax.transAxes, color=style.DIM, fontsize=style.SMALL)
    for curve in panel.curves:
        colour, line = looks[curve.steps]
        label = "before adaptation"
        if curve.steps:
            label = f"after {curve.steps} {formatting.plural(curve.steps, 'step')}"
        ax.plot(panel.x, curve.y, color=colour, linestyle=line, linewidth=1.5, label=label)
        place = 0.18 + 0.82 * taken.index(curve.steps) / len(taken)
        digits = 3 if 0.001 <= curve.mse < 1000 else 1  # there is little room, and 2e-05 is precise enough
        error = f"{curve.steps}\n{curve.mse:.{digits}g}"
        ax.text(place, 1.02, error, transform=ax.transAxes, color=colour, fontsize=style.SMALL)
    ax.plot(
        panel.support_x, panel.support_y, "o", c=style.INK, mec="white", ms=5.5, zorder=5, label="support set"
    )
    ax.set_title(plain(panel.title), pad=26)
    ax.set(xlabel="x", ylabel="y")
    ax.label_outer()
    ax.grid(True)


@dataclass(frozen=True)
class TaskPicture:
    """A few-shot task: its images (0..1 or uint8), and the adapted learner's prediction for each query."""

    support_NKCHW: Numbers
    query_MCHW: Numbers
    query_y_M: Numbers
    predicted_M: Numbers
    names: Sequence[str] | None = None  # of the classes, printed after their numbers


class _PictureLayout:
    """Positions of images in inches: blocks of at most FOLD classes, as many side by side as fit."""

    def __init__(self, pictures: Sequence[TaskPicture]) -> None:
        ways, shots = (max(picture.support_NKCHW.shape[axis] for picture in pictures) for axis in (0, 1))
        most = max(int(np.bincount(picture.predicted_M).max()) for picture in pictures)
        rows, self.folds = min(ways, FOLD), math.ceil(ways / FOLD)
        names = [name for picture in pictures for name in picture.names or ()]
        self.label = 0.28 + 0.065 * min(max(map(len, names), default=0), NAME)
        room = int((style.WIDTH - self.label - GAP) / CELL) - shots
        self.queries = min(most, max(min(room, QUERIES_SHOWN // ways), 3))
        self.first_query = self.label + shots * CELL + GAP
        self.block = self.first_query + self.queries * CELL + GAP
        beside = max(int((style.WIDTH + GAP) / self.block), 1)
        self.across = min(beside - beside % self.folds or beside, self.folds * len(pictures))
        height, width = pictures[0].query_MCHW.shape[-2:]
        self.tall = CELL * height / width
        self.down = TASK_HEAD + rows * (self.tall + STRIP)
        self.width = max(self.across * self.block, 6.0)
        self.height = 0.65 + math.ceil(len(pictures) * self.folds / self.across) * self.down

    def corner(self, task: int, way: int) -> tuple[float, float]:
        """The upper left corner of a class's row."""
        down, right = divmod(task * self.folds + way // FOLD, self.across)
        y = 0.35 + down * self.down + TASK_HEAD + way % FOLD * (self.tall + STRIP)
        return 0.08 + right * self.block, y


def tasks(pictures: Sequence[TaskPicture], title: str) -> Figure:
    """Draw few-shot tasks: a row per class, with its support set and the queries predicted as that class."""
    layout = _PictureLayout(pictures)
    with drawing(layout.width, layout.height, "") as figure:
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        for task, picture in enumerate(pictures):
            _task(ax, layout, task, picture)
        ax.text(0.08, 0.2, plain(title), fontsize=10, fontweight="bold")
        note = "Queries are next to their predicted class; thick frame and cross: wrong, true class below."
        ax.text(0.08, layout.height - 0.12, note, color=style.DIM)
        ax.set(xlim=(0, layout.width), ylim=(layout.height, 0), aspect="auto")
        ax.set_axis_off()
    return figure


def _task(ax: Axes, layout: _PictureLayout, task: int, picture: TaskPicture) -> None:
    x, y = layout.corner(task, 0)
    right = int((picture.predicted_M == picture.query_y_M).sum())
    left_out = int((np.bincount(picture.predicted_M) - layout.queries).clip(0).sum())
    note = f", {left_out} not shown" if left_out else ""
    head = f"Task {task + 1}: {right} of {len(picture.query_y_M)} queries right{note}"
    ax.text(x, y - 0.3, head, fontsize=9)
    size = CELL - EDGE, layout.tall - EDGE
    for way, support_KCHW in enumerate(picture.support_NKCHW):
        x, y = layout.corner(task, way)
        if way % FOLD == 0:
            ax.text(x, y - 0.09, "support", color=style.DIM)
            ax.text(x + layout.first_query, y - 0.09, "queries", color=style.DIM)
        name = formatting.elide_middle(plain(picture.names[way]), NAME) if picture.names else ""
        ax.text(x, y + layout.tall / 2, f"{way + 1} {name}".strip(), va="center")
        for shot, image_CHW in enumerate(support_KCHW):
            style.draw_image(ax, image_CHW, (x + layout.label + shot * CELL, y), size, style.DIM, 0.6)
        # The first ones, right or wrong, because a selection would be biased.
        for place, query in enumerate(np.flatnonzero(picture.predicted_M == way)[: layout.queries]):
            corner = x + layout.first_query + place * CELL, y
            truth = int(picture.query_y_M[query])
            edge, thick = (style.DIM, 0.6) if truth == way else (style.RED, 2.2)
            style.draw_image(ax, picture.query_MCHW[query], corner, size, edge, thick)
            if truth != way:
                style.draw_cross(ax, corner[0] + size[0], y)
                below = corner[0] + size[0] / 2, y + size[1] + 0.04
                ax.text(
                    *below, f"is {truth + 1}", color=style.RED, fontsize=style.SMALL, ha="center", va="top"
                )


def rates(rates: Mapping[str, Numbers], initial: float, title: str) -> Figure:
    """Draw learnt inner learning rates: a heat map if arrays have one per inner step, else histograms.

    Args:
        rates: of each tensor.
        initial: the rate at the start of training.
        title: of the figure.
    """
    by_step = all(values.ndim == 1 for values in rates.values())
    height = 1.5 + 0.27 * len(rates) if by_step else 0.9 + 0.42 * len(rates)
    with drawing(style.WIDTH, height, title) as figure:
        if by_step:
            _heat_map(figure, rates, initial)
        else:
            _histograms(figure, rates)
    return figure


def _heat_map(figure: Figure, rates: Mapping[str, Numbers], initial: float) -> None:
    rates_LI = np.stack(list(rates.values())).astype(np.float64)
    steps = rates_LI.shape[1]
    figure.set_figwidth(max(style.WIDTH, 1.6 + 0.36 * steps))
    ax = figure.subplots()
    limit = rate_figures.colour_limit([rate_figures.changes(rates_LI, initial)])
    mesh = rate_figures.heat_map(ax, rates_LI, initial, limit)
    significant, size = (3, 8) if steps <= CROWDED else (2, 7)
    digits = rate_figures.decimals(rates_LI, significant)
    rate_figures.write_rates(ax, mesh, rates_LI, digits=digits, size=size)
    rate_figures.label_cells(ax, list(rates), steps)
    ax.set_xlabel("inner step")
    rate_figures.draw_key(figure, mesh, [ax], [initial], limit)


def _histograms(figure: Figure, rates: Mapping[str, Numbers]) -> None:
    axes = figure.subplots(len(rates), sharex=True, squeeze=False, subplot_kw={"yticks": []})[:, 0]
    every = style.finite_values(*rates.values())
    low, high = every.min(initial=0), every.max(initial=0)
    width = (high - low) / BINS or 1.0
    # Zero is a bin edge, so that the red area is exactly the share of negative rates printed next to it.
    edges = width * np.arange(math.floor(low / width) - 1, math.floor(high / width) + 2)
    for ax, (name, values) in zip(axes, rates.items(), strict=True):
        finite = style.finite_values(values)
        counts, below = np.histogram(finite, edges)[0], edges[:-1] < 0
        ax.stairs(np.where(below, 0, counts), edges, fill=True, color=style.BLUE)
        ax.stairs(np.where(below, counts, 0), edges, fill=True, color=style.RED)
        share = formatting.percent(float((finite < 0).sum()) / max(finite.size, 1))
        counted = f"{finite.size:,} rates\n{share} negative"
        ax.text(1.01, 0.5, counted, transform=ax.transAxes, va="center", fontsize=style.SMALL)
        ax.set_ylabel(plain(name), rotation=0, ha="right", va="center")
        ax.spines["left"].set_visible(False)
    axes[-1].set_xlabel("inner learning rate of a weight")
