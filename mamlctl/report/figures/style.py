"""The look that all figures share, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = NDArray[Any]

WIDTH, DPI, SMALL = 7.2, 150, 7.5  # inches, pixels an inch, points: for a README's column of about 900 pixels

# Okabe & Ito's colours, told apart with every kind of colour vision, also on a light ground.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"

INK, DIM, CALM, GRID = "#222222", "#666666", "#C8C8C8", "#EAEAEA"

STYLE: dict[Any, Any] = (
    {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left"}
    | {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": DIM, "axes.linewidth": 0.6}
    | {"xtick.color": DIM, "ytick.color": DIM, "grid.color": GRID, "grid.linewidth": 0.6}
    | {"axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    | {"text.parse_math": False}  # a dollar in a run's name is a dollar
    | {"svg.hashsalt": "mamlctl"}  # without it, the names inside an SVG are drawn by chance
    | {"svg.fonttype": "path"}  # a reader without DejaVu would see other widths, and so overlaps
)


def _style() -> AbstractContextManager[None]:
    """For a block, STYLE over matplotlib's own defaults, whatever the user's matplotlibrc says."""
    import matplotlib

    # The choice of a backend stays: to read it would import pyplot.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    return matplotlib.rc_context({**defaults, **STYLE})


@contextmanager
def drawing(width: float, height: float, title: str) -> Iterator[Figure]:
    """A new figure; its layout is fixed at the end, so that every way to save it shows the same."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure((width, height), dpi=DPI, layout="constrained")
        figure.suptitle(plain(title), x=0.08 / width, ha="left", fontsize=10, fontweight="bold")
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # with "none" each way to save it would draw it once more, for nothing
        for ax in figure.axes:  # the solver's last digits are drawn by chance
            ax.set_position(ax.get_position().from_bounds(*np.round(ax.get_position().bounds, 6)))


def plain(text: str) -> str:
    """The text with a question mark for what DejaVu has no glyph for, which matplotlib would warn of."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in formatting.strip_controls(text))


def _finite(*parts: Numbers) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = np.concatenate([np.zeros(0), *map(np.ravel, parts)])
    return numbers[np.isfinite(numbers)]


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write stem.png and stem.svg, each in one move, and tell their paths."""
    png, svg = (stem.with_name(stem.name + ending) for ending in (".png", ".svg"))
    with _style(), replacing(png) as png_file, replacing(svg) as svg_file:
        figure.savefig(png_file, format="png", dpi=DPI)
        figure.savefig(svg_file, format="svg", metadata={"Date": None})
    return png, svg
