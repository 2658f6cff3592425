"""The picture that is made from receipts: validation accuracy against the time of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamlctl.core import formatting
from mamlctl.experiments.settings import fill_defaults
from mamlctl.report.figures import style
from records.experiments import FAST_5, FAST_20, OMNIGLOT_5, OMNIGLOT_20
from records.tables import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = Path(__file__).parents[2] / ".github" / "pictures" / "accuracy-per-minute"
PANELS = ((FAST_5, OMNIGLOT_5), (FAST_20, OMNIGLOT_20))
LINES = ((style.BLUE, "fast preset"), (style.DIM, "published schedule"))  # of each panel
ACCURACIES = (50, 70, 80, 90, 95, 97, 98, 99, 99.5)  # in percent; the axis is logarithmic in the error
MINUTES = (0.5, 1, 2, 5, 10, 20, 60, 180)


def accuracy_per_minute(found: Sequence[Line]) -> Figure:
    """Draw a panel per task, with a line for every seed that has a receipt."""
    by_name = {line.experiment.name: line for line in found}
    with style.drawing(style.WIDTH, 3.0, "Validation accuracy against minutes of training") as figure:
        panels = figure.subplots(1, len(PANELS), sharex=True)
        for ax, names in zip(panels, PANELS, strict=True):
            for name, (colour, label) in zip(names, LINES, strict=True):
                _draw_seeds(ax, by_name[name], colour, label)
            config = fill_defaults(by_name[names[0]].experiment.config)
            ax.set_title(formatting.task(config.dataset, config.ways, config.shots))
            _scale(ax)
            if ax.lines:
                ax.legend(loc="lower right")
        panels[0].set_ylabel("accuracy, %")
    return figure


def _draw_seeds(ax: Axes, line: Line, colour: str, label: str) -> None:
    places = [place for receipt in line.receipts for place in receipt["environments"]]
    on_gpu = [place["device"].startswith("cuda") for place in places]
    if any(on_gpu):
        label += ", on a GPU" if all(on_gpu) else ", partly on a GPU"
    for number, receipt in enumerate(line.receipts):
        seconds, curve = receipt["training"]["validated_s"], receipt["validation"]["curve"]
        # A process that was killed just after a validation has not stored its time.
        timed = [(seconds[str(step)] / 60, score) for step, score, _ in curve if str(step) in seconds]
        minutes = [point for point, _ in timed]
        errors = [100 - 100 * score for _, score in timed]
        ax.plot(
            minutes, errors, ".-", color=colour, linewidth=1, markersize=3, label=None if number else label
        )


def _scale(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.invert_yaxis()
    ax.minorticks_off()
    ax.set_xticks(MINUTES, [f"{minutes:g}" for minutes in MINUTES])
    ax.set_yticks([100 - score for score in ACCURACIES], [f"{score:g}" for score in ACCURACIES])
    ax.set_xlabel("minutes, with validation")
    ax.grid(visible=True)


def save(found: Sequence[Line], stem: Path = FILE) -> Path:
    """Write the picture, as SVG, and return its path. `stem` is that path without its ending."""
    png, svg = style.save(accuracy_per_minute(found), stem)
    png.unlink()
    return svg
