"""The contact sheet of the user's own images: the support set, and a prediction for each query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mamlctl.core import formatting
from mamlctl.report.figures import style
from mamlctl.report.figures.style import Numbers, drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 60  # queries per sheet: the first ones, because a selection would be biased
SUPPORT_SHOWN = 10  # support images per class
CLASSES_SHOWN = 60

# Inches.
MARGIN = 0.1  # around the sheet
SUPPORT = 0.42  # side of a support image
QUERY = 0.6  # side of a query
SPACE = 0.1  # between images
LINE = 0.14  # height of a line of small text
HEAD = 0.34

# Characters of a class name.
NAME = 18  # to the left of its support images
LABEL = 12  # under a query


@dataclass(frozen=True)
class QueryPicture:
    """A query image (0..1 or uint8) and its predicted class."""

    image_CHW: Numbers
    predicted: str
    probability: float
    right: bool | None  # None if the true class is not known


def sheet(
    support: Sequence[tuple[str, Numbers]], queries: Sequence[QueryPicture], total: int, title: str
) -> Figure:
    """Draw the support images, one row per class, then the first queries with their predictions.

    Args:
        support: the name and images_MCHW (0..1 or uint8) of each class.
        queries: the first queries; those beyond SHOWN are not drawn.
        total: number of all queries.
        title: printed at the top.

    Returns:
        A figure of style.WIDTH inches, as high as the images need.
    """
    longest = max(len(formatting.elide_middle(name, NAME)) for name, _ in support[:CLASSES_SHOWN])
    label = 0.12 + 0.068 * longest
    across = int((style.WIDTH - 2 * MARGIN + SPACE) / (QUERY + SPACE))
    support_top = 0.3 + HEAD
    some = support[:CLASSES_SHOWN]
    query_top = support_top + len(some) * (SUPPORT + SPACE) + HEAD
    query_down = QUERY + 2 * LINE + SPACE
    shown = queries[:SHOWN]
    height = query_top + math.ceil(len(shown) / across) * query_down + MARGIN
    with drawing(style.WIDTH, height, "") as figure:
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.text(MARGIN, 0.22, plain(title), fontsize=10, fontweight="bold")
        head = "Support set"
        if len(support) > CLASSES_SHOWN:
            head += f" (the first {CLASSES_SHOWN} of {len(support)} classes)"
        ax.text(MARGIN, support_top - 0.08, head, fontsize=9)
        for row, (name, images_MCHW) in enumerate(some):
            y = support_top + row * (SUPPORT + SPACE)
            ax.text(MARGIN, y + SUPPORT / 2, formatting.elide_middle(plain(name), NAME), va="center")
            for place, image_CHW in enumerate(images_MCHW[:SUPPORT_SHOWN]):
                x = MARGIN + label + place * (SUPPORT + SPACE / 2)
                style.draw_image(ax, image_CHW, (x, y), (SUPPORT, SUPPORT), style.DIM, 0.6)
            more = len(images_MCHW) - SUPPORT_SHOWN
            if more > 0:
                x = MARGIN + label + SUPPORT_SHOWN * (SUPPORT + SPACE / 2)
                ax.text(x, y + SUPPORT / 2, f"and {more} more", va="center", c=style.DIM)
        if shown:
            ax.text(MARGIN, query_top - 0.08, _query_head(queries, total), fontsize=9)
        for number, query in enumerate(shown):
            down, right = divmod(number, across)
            _query(ax, query, MARGIN + right * (QUERY + SPACE), query_top + down * query_down)
        ax.set(xlim=(0, style.WIDTH), ylim=(height, 0), aspect="auto")
        ax.set_axis_off()
    return figure


def _query_head(queries: Sequence[QueryPicture], total: int) -> str:
    some = f"the first {SHOWN} of {total}" if total > SHOWN else str(total)
    labelled = any(query.right is not None for query in queries)
    marks = "; thick frame and cross: wrong" if labelled else ""
    return f"Queries ({some}): predicted class and its probability{marks}"


def _query(ax: Axes, query: QueryPicture, x: float, y: float) -> None:
    edge = {None: style.DIM, True: style.GREEN, False: style.RED}[query.right]
    thick = {None: 0.6, True: 1.4, False: 2.6}[query.right]
    style.draw_image(ax, query.image_CHW, (x, y), (QUERY, QUERY), edge, thick)
    if query.right is False:
        style.draw_cross(ax, x + QUERY, y)
    look: dict[str, Any] = {"fontsize": style.SMALL, "ha": "center", "va": "top"}
    name = formatting.elide_middle(plain(query.predicted), LABEL)
    ax.text(x + QUERY / 2, y + QUERY + 0.05, name, color=edge, **look)
    share = formatting.percent(query.probability, 0)
    ax.text(x + QUERY / 2, y + QUERY + 0.05 + LINE, share, color=style.DIM, **look)
