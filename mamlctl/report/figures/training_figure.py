"""The figure of a run's training, from the rows of metrics.jsonl; only drawing it imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.core.literals import Metric
from mamlctl.report.figures import style
from mamlctl.report.figures.style import Numbers, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Key = TypeVar("Key")

LOSS_LINES = 6  # more shades would be hard to distinguish


def training(reports: Rows, validations: Rows, metric: Metric) -> Figure:
    """Draw the curves of a run: query losses by inner steps taken, validation scores and meta learning rate.

    Args:
        reports: the training reports in metrics.jsonl.
        validations: the validations in metrics.jsonl.
        metric: of the run; training accuracies are only drawn for "accuracy".

    Returns:
        A figure with meta-steps on the x axis; null values are gaps. Returns are drawn as minus themselves on
        an axis that is upside down, since most are negative and a log axis is not. Steps inside a trust
        region have no meta learning rate, and no panel for it.
    """
    from matplotlib import colormaps

    steps, lr = (_column(reports, key) for key in ("step", "meta_lr"))
    losses = _columns(reports, "query_losses")
    trained = _columns(reports, "query_accuracies")[-1:] if metric == "accuracy" else []
    val_steps, score, half = (_column(validations, key) for key in ("step", f"val_{metric}", "val_ci95"))
    is_return = metric == "return"
    has_score, has_rate = style.finite_values(score, *trained).size, style.finite_values(lr).size
    heights = [3.0, *([2.2] if has_score else []), *([1.0] if has_rate or not is_return else [])]
    with drawing(style.WIDTH, 0.6 + 0.85 * sum(heights), "") as figure:
        axes = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        middle: list[Axes] = list(axes[1:2]) if has_score else []
        top = axes[0]
        chosen = formatting.evenly_spaced(len(losses), LOSS_LINES)
        # The yellow end of the scale is left out, because it is hard to see on white.
        for taken, shade in zip(chosen, colormaps["viridis"](np.linspace(0.88, 0, len(chosen))), strict=True):
            _metric_line(top, steps, losses[taken], color=shade, label=str(taken))
        _use_log_axis(top, *losses, returns=is_return)
        top.set_title("Mean return in training" if is_return else "Query loss in training")
        for ax in middle:
            for accuracies in trained:
                _metric_line(ax, steps, accuracies, color=style.CALM, label="training tasks")
            drawn = -score if is_return else score
            _metric_line(ax, val_steps, drawn, color=style.BLUE, label="validation tasks,\n95 % interval")
            edge = 1.2 if len(score) == 1 else 0  # the band of a single validation has no width
            ax.fill_between(
                val_steps, drawn - half, drawn + half, color=style.BLUE, alpha=0.2, linewidth=edge
            )
            ax.set_title(
                "Query accuracy after adaptation" if metric == "accuracy" else f"Validation {metric}"
            )
            if metric == "accuracy":
                ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
            else:
                _use_log_axis(ax, drawn, returns=is_return)
        for bottom in axes[1 + len(middle) :]:
            _metric_line(bottom, steps, lr, color=style.INK)
            highest = 1.1 * max(style.finite_values(lr), default=0.0) or 1.0
            bottom.set(ylim=(0, highest), title="Meta learning rate")
        axes[-1].locator_params(axis="x", integer=True, min_n_ticks=1)
        axes[-1].set_xlabel("meta-step")
        for ax in axes:
            legend = "inner steps taken" if ax is top else "measured on"
            ax.grid(True, which="both")
            if ax.get_legend_handles_labels()[0]:
                ax.legend(title=legend, alignment="left", loc="upper left", bbox_to_anchor=(1.0, 1.05))
    return figure


def _use_log_axis(ax: Axes, *losses: Numbers, returns: bool = False) -> None:
    """Draw positive losses on a log axis; one that also had to show 0 or less stays linear.

    Args:
        ax: the axes.
        losses: what they show.
        returns: whether these are minus returns, which the axis names instead, with higher ones above.
    """
    finite = style.finite_values(*losses)
    is_log = finite.size and finite.min() > 0
    if is_log:
        ax.set_yscale("log", subs=[2, 5])
        ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    if returns:
        ax.invert_yaxis()
        ax.yaxis.set_major_formatter(_negated)
        ax.yaxis.set_minor_formatter(_negated if is_log else "")


def _negated(loss: float, _: object) -> str:
    return formatting.minus_signs(f"{-loss + 0.0:g}")  # + 0.0 turns -0 into 0


def _column(rows: Sequence[Mapping[Key, Any]], key: Key) -> NDArray[np.float64]:
    """One number per row; a missing one is NaN, which is drawn as a gap."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _columns(rows: Rows, key: str) -> list[NDArray[np.float64]]:
    """Split the lists of all rows into columns, one per number of inner steps taken."""
    lists = [dict(enumerate(row.get(key) or ())) for row in rows]
    return [_column(lists, place) for place in range(max(map(len, lists), default=0))]


def _metric_line(ax: Axes, x: Numbers, y: Numbers, color: str | Numbers, label: str | None = None) -> None:
    is_finite = np.isfinite(np.r_[np.nan, y, np.nan])
    # A value without neighbours is drawn as a point, because no line would show it.
    alone = np.flatnonzero(is_finite[1:-1] & ~is_finite[:-2] & ~is_finite[2:]).tolist()
    if is_finite.any():
        marker = "." if alone else ""
        ax.plot(x, y, lw=1.0, color=color, label=label, marker=marker, markevery=alone or None)
