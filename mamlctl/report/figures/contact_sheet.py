"""The contact sheet of the user's own images: what was learnt from, what each is taken for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mamlctl.core import formatting
from mamlctl.report.figures.style import DIM, GREEN, RED, SMALL, WIDTH, Numbers, drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 60  # queries of a sheet, the first ones: a choice would flatter or blame

SUPPORT_SHOWN, CLASSES_SHOWN = 10, 60  # images of a class; classes

MARGIN, SUPPORT, QUERY = 0.1, 0.42, 0.6  # inches: around all, sides of a support image and of a query

SPACE, LINE, HEAD = 0.1, 0.14, 0.34  # inches: between images, a line of small letters, a heading

NAME, LABEL = 18, 12  # letters of a class beside its support images, and under a query


@dataclass(frozen=True)
class QueryPicture:
    """An image, 0..1 or uint8, and what it is taken for."""

    image_CHW: Numbers
    predicted: str
    probability: float
    right: bool | None  # None where the truth is not known


def sheet(
    support: Sequence[tuple[str, Numbers]], queries: Sequence[QueryPicture], total: int, title: str
) -> Figure:
    """A row for each class's name and images_MCHW, then the first queries of `total`."""
    longest = max(len(formatting.elide_middle(name, NAME)) for name, _ in support[:CLASSES_SHOWN])
    label = 0.12 + 0.068 * longest
    across = int((WIDTH - 2 * MARGIN + SPACE) / (QUERY + SPACE))
    support_top = 0.3 + HEAD
    some = support[:CLASSES_SHOWN]
    query_top = support_top + len(some) * (SUPPORT + SPACE) + HEAD
    query_down = QUERY + 2 * LINE + SPACE
    shown = queries[:SHOWN]
    height = query_top + math.ceil(len(shown) / across) * query_down + MARGIN
    with drawing(WIDTH, height, "") as figure:
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.text(MARGIN, 0.22, plain(title), fontsize=10, fontweight="bold")
        first = f" (the first {CLASSES_SHOWN} of {len(support)} classes)" * (len(support) > CLASSES_SHOWN)
        ax.text(MARGIN, support_top - 0.08, f"Support set: what it learnt from{first}", fontsize=9)
        for row, (name, images_MCHW) in enumerate(some):
            y = support_top + row * (SUPPORT + SPACE)
            ax.text(MARGIN, y + SUPPORT / 2, formatting.elide_middle(plain(name), NAME), va="center")
            for place, image_CHW in enumerate(images_MCHW[:SUPPORT_SHOWN]):
                _image(ax, image_CHW, MARGIN + label + place * (SUPPORT + SPACE / 2), y, SUPPORT, DIM, 0.6)
            if len(images_MCHW) > SUPPORT_SHOWN:
                x = MARGIN + label + SUPPORT_SHOWN * (SUPPORT + SPACE / 2)
                ax.text(
                    x, y + SUPPORT / 2, f"and {len(images_MCHW) - SUPPORT_SHOWN} more", va="center", c=DIM
                )
        if shown:
            ax.text(MARGIN, query_top - 0.08, _told(queries, total), fontsize=9)
        for number, query in enumerate(shown):
            down, right = divmod(number, across)
            _query(ax, query, MARGIN + right * (QUERY + SPACE), query_top + down * query_down)
        ax.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
        ax.set_axis_off()
    return figure


def _told(queries: Sequence[QueryPicture], total: int) -> str:
    """What the queries' heading says."""
    some = f"the first {SHOWN} of {total}" if total > SHOWN else str(total)
    known = any(query.right is not None for query in queries)
    return f"Queries ({some}): predicted class and its probability" + known * "; thick frame, cross: wrong"


def _query(ax: Axes, query: QueryPicture, x: float, y: float) -> None:
    edge = {None: DIM, True: GREEN, False: RED}[query.right]
    _image(ax, query.image_CHW, x, y, QUERY, edge, {None: 0.6, True: 1.4, False: 2.6}[query.right])
    if query.right is False:  # not by colour alone
        ax.plot(x + QUERY, y, "X", color=RED, markersize=8, markeredgecolor="white")
    for line, text in enumerate(
        (formatting.elide_middle(plain(query.predicted), LABEL), f"{100 * query.probability:.0f} %")
    ):
        where = y + QUERY + 0.05 + line * LINE
        ax.text(
            x + QUERY / 2,
            where,
            text,
            fontsize=SMALL,
            ha="center",
            va="top",
            color=edge if line == 0 else DIM,
        )


def _image(ax: Axes, image_CHW: Numbers, x: float, y: float, side: float, edge: str, thick: float) -> None:
    pixels_HWC = np.moveaxis(image_CHW / (255 if image_CHW.dtype == np.uint8 else 1), 0, -1).clip(0, 1)
    ax.imshow(pixels_HWC, extent=(x, x + side, y + side, y), cmap="gray", vmin=0, vmax=1)
    ax.fill([x, x + side, x + side, x], [y, y, y + side, y + side], fill=False, ec=edge, lw=thick)
