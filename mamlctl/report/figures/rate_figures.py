"""Heat maps of learnt inner rates: tensors down, inner steps across, coloured by the change in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.report.figures import style
from mamlctl.report.figures.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

# The change from the initial rate, as a share of it, that has the darkest colour is the largest one in the
# figure, within these limits: a change by 1 % never stands out, and one extreme rate hides no other.
LEAST, MOST = 0.25, 1.0

# Text on a coloured cell has the same colour in dark mode, so svg.py must not recognise it as INK or paper.
DARK_ON_CELL, LIGHT_ON_CELL = "#000000", "#fdfdfd"
LUMA = (0.2126, 0.7152, 0.0722)  # weights of linear red, green and blue in luminance (Rec. 709)
EQUAL_CONTRAST = 0.179  # luminance at which black and white text have the same contrast, 4.6, by WCAG 2


def changes(rates: Floats, initial: float) -> Floats:
    """The changes of rates from their initial value, as shares of it: 0.12 from 0.1 is 0.2."""
    return rates / initial - 1


def colour_limit(changed: Sequence[Floats]) -> float:
    """The size of the change that has the darkest colour in a figure of all these changes."""
    return float(np.clip(abs(style.finite_values(*changed)).max(initial=0), LEAST, MOST))


def heat_map(ax: Axes, rates_LI: Floats, initial: float, limit: float) -> QuadMesh:
    """Draw rates on diverging colours around the initial one, which is the palest.

    Args:
        ax: the axes; they get one unit per tensor down and per inner step across.
        rates_LI: the rates; NaN is not drawn.
        initial: the rate at the start of training.
        limit: the change that has the darkest colour, from `colour_limit`.
    """
    from matplotlib import colormaps

    scale = colormaps["PuOr"].with_extremes(bad=(0, 0, 0, 0))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    # The edges close the seams that viewers would show between cells.
    return ax.pcolormesh(
        changes(rates_LI, initial), cmap=scale, vmin=-limit, vmax=limit, edgecolors="face", linewidth=0.2
    )


def write_rates(ax: Axes, mesh: QuadMesh, rates_LI: Floats, *, digits: int, size: float) -> None:
    """Write each rate into its cell, in black or white, whichever is easier to read.

    Args:
        ax: the axes of the heat map.
        mesh: the heat map.
        rates_LI: its rates.
        digits: decimals.
        size: of the font, in points.
    """
    changed = mesh.get_array()
    assert changed is not None
    colours_LI4 = mesh.to_rgba(changed).reshape(*rates_LI.shape, 4)
    for (row, step), rate in np.ndenumerate(rates_LI):
        if np.isfinite(rate):
            ink = DARK_ON_CELL if luminance(colours_LI4[row, step]) > EQUAL_CONTRAST else LIGHT_ON_CELL
            text = formatting.minus_signs(f"{rate:.{digits}f}")
            ax.text(step + 0.5, row + 0.5, text, c=ink, ha="center", va="center", fontsize=size)


def decimals(rates: Floats, significant: int) -> int:
    """The decimals with which the largest rate has this many significant digits."""
    most = float(abs(style.finite_values(rates)).max(initial=0)) or 1.0
    return max(significant - 1 - math.floor(math.log10(most)), 0)


def luminance(colour: Floats) -> float:
    """The relative luminance of a colour (red, green, blue, 0..1) as WCAG 2 defines it."""
    rgb = np.asarray(colour[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(np.dot(linear, LUMA))


def label_cells(ax: Axes, names: Sequence[str], steps: int) -> None:
    """Name the tensors at the left and number the inner steps below, from 1.

    Args:
        ax: the axes of a heat map.
        names: of the tensors.
        steps: the number of inner steps.
    """
    ax.set_yticks(np.arange(len(names)) + 0.5, [plain(name) for name in names])
    ax.set_xticks(np.arange(steps) + 0.5, [str(step + 1) for step in range(steps)])
    ax.set_ylim(len(names), 0)


def draw_key(
    figure: Figure, mesh: QuadMesh, axes: Sequence[Axes], initial: Sequence[float], limit: float
) -> None:
    """Draw the colour scale below the heat maps; it names the initial rate if all maps have the same.

    Args:
        figure: the figure.
        mesh: one of its heat maps.
        axes: the axes of all heat maps.
        initial: the initial rates of all heat maps.
        limit: the change that has the darkest colour.
    """
    is_clipped = limit == MOST
    key = figure.colorbar(
        mesh,
        ax=axes,
        location="bottom",
        shrink=0.5,
        aspect=45,
        pad=0.02,
        ticks=[-limit, 0, limit],
        extend="both" if is_clipped else "neither",
    )
    same = f" of {initial[0]:g}" if len(set(initial)) == 1 else ""
    less, more = (" or less", " or more") if is_clipped else ("", "")
    key.ax.set_xticklabels([f"−{100 * limit:.0f} %{less}", "0", f"+{100 * limit:.0f} %{more}"])
    key.set_label(f"change from the initial rate{same}")
    assert key.solids is not None
    key.solids.set(rasterized=False, edgecolor="face")  # a page has no embedded images
    key.outline.set_visible(False)
    key.ax.tick_params(length=0)
