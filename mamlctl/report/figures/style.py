"""The look that all figures share, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

Numbers = NDArray[Any]

WIDTH = 7.2  # inches: for a README's column of about 900 pixels
DPI = 150  # pixels per inch
SMALL = 7.5  # points

# Okabe & Ito's colours, told apart with every kind of colour vision, also on a light ground.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
INK = "#222222"
DIM = "#666666"
CALM = "#C8C8C8"
GRID = "#EAEAEA"
LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709's shares of red, green and blue in what the eye takes for light

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
    "text.parse_math": False,  # a dollar in a run's name is a dollar
    "svg.hashsalt": "mamlctl",  # without it, the names inside an SVG are drawn by chance
    "svg.fonttype": "path",  # a reader without DejaVu would see other widths, and so overlaps
}


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


def finite_values(*parts: Numbers) -> NDArray[np.float64]:
    """The finite numbers of all arrays, in one flat array."""
    numbers: NDArray[np.float64] = np.concatenate([np.zeros(0), *map(np.ravel, parts)])
    return numbers[np.isfinite(numbers)]


def rate_colours(rates: NDArray[np.float64]) -> tuple[Colormap, float, float]:
    """A colour scale for inner rates, with a second hue where some are negative, and its two ends."""
    from matplotlib import colormaps

    finite = finite_values(rates)
    most = float(abs(finite).max(initial=0)) or 1.0
    least = -most if (finite < 0).any() else 0.0
    return colormaps["Blues" if least == 0 else "PuOr"], least, most


def is_light(colour: Sequence[float] | Numbers) -> bool:
    """Whether dark letters are read better on the colour (red, green, blue, 0..1) than white ones."""
    return bool(np.dot(colour[:3], LUMA) > 0.5)


def draw_image(
    ax: Axes,
    image_CHW: Numbers,
    corner: tuple[float, float],
    size: tuple[float, float],
    edge: str,
    thick: float,
) -> None:
    """Draw an image (0..1 or uint8) in a frame; `corner` and `size` are x and y in the axes' units."""
    (x, y), (width, height) = corner, size
    pixels_HWC = np.moveaxis(image_CHW / (255 if image_CHW.dtype == np.uint8 else 1), 0, -1).clip(0, 1)
    ax.imshow(pixels_HWC, extent=(x, x + width, y + height, y), cmap="gray", vmin=0, vmax=1)
    ax.fill([x, x + width, x + width, x], [y, y, y + height, y + height], fill=False, ec=edge, lw=thick)


def draw_cross(ax: Axes, x: float, y: float) -> None:
    """Mark a wrong prediction, so that it is not known by its colour alone."""
    ax.plot(x, y, "X", color=RED, markersize=8, markeredgecolor="white")


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write stem.png and stem.svg, each in one move, and return their paths."""
    png, svg = (stem.with_name(stem.name + ending) for ending in (".png", ".svg"))
    with _style(), replacing(png) as png_file, replacing(svg) as svg_file:
        figure.savefig(png_file, format="png", dpi=DPI)
        figure.savefig(svg_file, format="svg", metadata={"Date": None})
    return png, svg
