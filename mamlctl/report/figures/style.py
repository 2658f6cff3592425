"""The look that all figures share, and how they are saved."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

Numbers = NDArray[Any]

WIDTH = 7.2  # inches: about 900 pixels, the width of a README on GitHub
DPI = 150  # pixels per inch
SMALL = 7.5  # points

# Okabe and Ito's palette, which is distinguishable with every kind of colour vision.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
INK = "#222222"
DIM = "#666666"
CALM = "#C8C8C8"
GRID = "#EAEAEA"

STYLE: dict[RcKeyType, str | float] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": DIM,
    "axes.linewidth": 0.6,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a run's name does not start a formula
    "svg.hashsalt": "mamlctl",  # without it, the ids in an SVG are random
    "svg.fonttype": "path",  # text in another font than DejaVu would be wider, and could overlap
}


def _style() -> AbstractContextManager[None]:
    """A context with STYLE and matplotlib's defaults, whatever the user's matplotlibrc contains."""
    import matplotlib

    # The backend is not reset, because reading it would import pyplot.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    return matplotlib.rc_context({**defaults, **STYLE})


@contextmanager
def drawing(width: float, height: float, title: str) -> Iterator[Figure]:
    """Yield a new figure, and fix its layout at the end, so that every file format has the same layout.

    Args:
        width: in inches.
        height: in inches.
        title: printed at the top left.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure((width, height), dpi=DPI, layout="constrained")
        figure.suptitle(plain(title), x=0.08 / width, ha="left", fontsize=10, fontweight="bold")
        yield figure
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)  # less work than `draw_without_rendering`, which also draws every artist
        figure.set_layout_engine(None)  # with "none", each save would draw the figure once more
        for ax in figure.axes:  # the layout solver's last digits vary from run to run
            ax.set_position(ax.get_position().from_bounds(*np.round(ax.get_position().bounds, 6)))


def plain(text: str) -> str:
    """Replace characters that DejaVu lacks with '?'; matplotlib would warn about them."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in formatting.strip_controls(text))


def finite_values(*parts: Numbers) -> NDArray[np.float64]:
    """The finite numbers of all arrays, in one flat array."""
    numbers: NDArray[np.float64] = np.concatenate([np.zeros(0), *map(np.ravel, parts)])
    return numbers[np.isfinite(numbers)]


def draw_image(
    ax: Axes,
    image_CHW: Numbers,
    corner: tuple[float, float],
    size: tuple[float, float],
    edge: str,
    thick: float,
) -> None:
    """Draw the image inside a frame.

    Args:
        ax: the axes; y points down.
        image_CHW: 0..1 or uint8.
        corner: x and y of the upper left corner, in data coordinates.
        size: width and height, in data coordinates.
        edge: colour of the frame.
        thick: line width of the frame, in points.
    """
    (x, y), (width, height) = corner, size
    pixels_HWC = np.moveaxis(image_CHW / (255 if image_CHW.dtype == np.uint8 else 1), 0, -1).clip(0, 1)
    ax.imshow(pixels_HWC, extent=(x, x + width, y + height, y), cmap="gray", vmin=0, vmax=1)
    ax.fill([x, x + width, x + width, x], [y, y, y + height, y + height], fill=False, ec=edge, lw=thick)


def draw_cross(ax: Axes, x: float, y: float) -> None:
    """Mark a wrong prediction with a cross, so that it is not shown by colour alone.

    Args:
        ax: the axes.
        x: the centre of the cross, in data units.
        y: the same, vertically.
    """
    ax.plot(x, y, "X", color=RED, markersize=8, markeredgecolor="white")


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write stem.png and stem.svg, each atomically, and return their paths."""
    png, svg = (stem.with_name(stem.name + ending) for ending in (".png", ".svg"))
    with _style(), replacing(png) as png_file, replacing(svg) as svg_file:
        figure.savefig(png_file, format="png", dpi=DPI)
        figure.savefig(svg_file, format="svg", metadata={"Date": None})
    return png, svg
