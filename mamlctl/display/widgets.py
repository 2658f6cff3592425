"""Bars, sparklines, rules and colours, drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
DIM = "dim"
Colour = tuple[int, int, int]


def both_ends(left: Text, right: Text, width: int) -> Text:
    """One text at the beginning of the line, the other at its end."""
    return Text.assemble(left, " " * max(width - left.cell_len - right.cell_len - 1, 2), right)


def rule(title: str, note: str, width: int) -> Text:
    """A section's title, a line, and what else there is to say about the section."""
    line = "─" * max(width - len(title) - len(note) - 4, 2)
    return Text.assemble(" ", (title, "bold"), " ", (line, DIM), " ", (note, DIM))


def bar(share: float, columns: int, chance: float | None, colour: str) -> Text:
    """A bar in eighths of a column, with a mark where chance is, unless that is passed or not known."""
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
    """One block per value, from the least to the greatest; a dot where the value is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # A nearly flat history is drawn flat: noise of a few percent is no news.
    span = max(high - low, 0.05 * abs(high)) or 1.0
    return "".join(block((value - low) / span) if math.isfinite(value) else "·" for value in values)


def block(share: float) -> str:
    """A block of that share of a line's height, at least an eighth."""
    return BLOCKS[min(max(int(share * len(BLOCKS)), 0), len(BLOCKS) - 1)]


def between(cold: Colour, warm: Colour, share: float) -> str:
    """The colour at that share of the way from one to the other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(cold, warm, strict=True))
    return f"rgb({red},{green},{blue})"
