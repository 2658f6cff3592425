"""Bars, sparklines, rules and colours, drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
DIM = "dim"
Colour = tuple[int, int, int]

# Red, green and blue at the ends of colour scales, readable on black and on white.
COLD = (90, 130, 190)
WARM = (0, 175, 135)


def both_ends(left: Text, right: Text, width: int) -> Text:
    """One text at the start of a line, the other at its end.

    Args:
        left: the text at the start.
        right: the text at the end.
        width: of the line, in columns; a longer line keeps both texts.
    """
    return Text.assemble(left, " " * max(width - left.cell_len - right.cell_len - 1, 2), right)


def rule(title: str, note: str, width: int) -> Text:
    """The title of a section, a line, and a note.

    Args:
        title: at the start.
        note: at the end.
        width: of all three, in columns.
    """
    line = "─" * max(width - len(title) - len(note) - 4, 2)
    return Text.assemble(" ", (title, "bold"), " ", (line, DIM), " ", (note, DIM))


def bar(share: float, columns: int, chance: float | None, colour: str) -> Text:
    """Draw a bar in eighths of a column.

    Args:
        share: length of the bar, 0..1; drawn as 0 if it is not finite.
        columns: width of a full bar.
        chance: position of the chance mark, 0..1, which a longer bar covers; None for no mark.
        colour: style of the bar.
    """
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    eighths = round(share * columns * 8)
    full, part = divmod(eighths, 8)
    drawn = "█" * full + (EIGHTHS[part] if part else "")
    empty = [" "] * (columns - len(drawn))
    mark = -1 if chance is None else min(int(chance * columns), columns - 1) - len(drawn)
    if 0 <= mark < len(empty):
        empty[mark] = "┊"
    return Text.assemble((drawn, colour), ("".join(empty), DIM))


def spark(values: Sequence[float]) -> str:
    """One block per value, scaled from the lowest to the highest; a dot for a value that is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # A nearly flat history is drawn flat, because noise of a few percent is not informative.
    span = max(high - low, 0.05 * abs(high)) or 1.0
    return "".join(block((value - low) / span) if math.isfinite(value) else "·" for value in values)


def block(share: float) -> str:
    """A block whose height is that share of a line, at least an eighth."""
    return BLOCKS[min(max(int(share * len(BLOCKS)), 0), len(BLOCKS) - 1)]


def between(cold: Colour, warm: Colour, share: float) -> str:
    """A colour between two others, as rich writes it.

    Args:
        cold: the colour at 0.
        warm: the colour at 1.
        share: 0..1.
    """
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(cold, warm, strict=True))
    return f"rgb({red},{green},{blue})"


def step_colour(step: int, count: int) -> str:
    """The colour of an inner step among `count` numbers of steps, the first of which is 0."""
    return between(COLD, WARM, step / max(count - 1, 1))
