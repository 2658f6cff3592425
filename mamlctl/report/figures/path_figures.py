"""Figures of navigation tasks: paths before and after adaptation, beside the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mamlctl.core import formatting
from mamlctl.report.figures import style
from mamlctl.report.figures.style import Numbers, drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 2.0  # inches of a panel
MARGIN = 0.35  # around the square of goals, in units of the plane; paths are cut off there
LOOKS = {"before": (style.DIM, ":"), "between": (style.ORANGE, "--"), "after": (style.BLUE, "-")}


@dataclass(frozen=True)
class PathPanel:
    """The paths of one policy in one task."""

    title: str
    goal: tuple[float, float]
    paths: Mapping[int, Sequence[Numbers]]  # inner steps taken -> the positions of some trajectories, _H2
    returns: Mapping[int, float]  # inner steps taken -> mean return


def paths(rows: Sequence[Sequence[PathPanel]], half_side: float, title: str) -> Figure:
    """Draw tasks in rows and policies in columns.

    Args:
        rows: the panels, a row for each task.
        half_side: goals are in a square of this half side around the origin.
        title: of the figure.
    """
    width = max(len(rows[0]) * (SIDE + 0.25) + 0.5, 4.6)
    with drawing(width, 0.95 + (SIDE + 0.5) * len(rows), title) as figure:
        axes = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=True, squeeze=False)
        for row, row_axes in zip(rows, axes, strict=True):
            for panel, ax in zip(row, row_axes, strict=True):
                _draw(ax, panel)
                limit = half_side + MARGIN
                ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
                ax.label_outer()
                ax.grid(True)
        lines = {line.get_label(): line for ax in axes.flat for line in ax.lines}
        figure.legend(
            handles=[line for label, line in lines.items() if str(label)[:1] != "_"],
            loc="outside lower left",
            ncols=3,
        )
    return figure


def _draw(ax: Axes, panel: PathPanel) -> None:
    last = max(panel.paths)
    texts = []
    for steps, of_step in panel.paths.items():
        colour, line = LOOKS["before" if steps == 0 else "after" if steps == last else "between"]
        label = f"after {steps} {formatting.plural(steps, 'step')}" if steps else "before adaptation"
        for number, path in enumerate(of_step):
            name = label if number == 0 else "_"
            ax.plot(path[:, 0], path[:, 1], color=colour, linestyle=line, linewidth=1.1, label=name)
        texts.append((f"{steps}\n{panel.returns[steps]:.3g}", colour))
    ax.plot(0, 0, "o", color=style.INK, ms=4, label="start", zorder=5)
    ax.plot(*panel.goal, "*", color=style.RED, mec="white", mew=0.6, ms=11, label="goal", zorder=6)
    # The returns are above the axes, where they cover no path.
    ax.text(0, 1.02, "steps\nreturn", transform=ax.transAxes, color=style.DIM, fontsize=style.SMALL)
    for place, (text, colour) in enumerate(texts):
        where = 0.3 + 0.7 * place / len(texts)
        ax.text(where, 1.02, text, transform=ax.transAxes, color=colour, fontsize=style.SMALL)
    ax.set_title(plain(panel.title), pad=26)
