"""Lists of names, and the data sets of `fetch`: a table of all, and one line per outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.core.results import FetchedSet, ListedSet, VerifiedSet
from mamlctl.display.console import WIDEST, say, say_description, say_table, table_fits

HEADS = ["name", "prepared", "download", "licence", "from", "description"]


def _state(entry: ListedSet) -> str:
    if entry.damage:
        return "damaged"
    if entry.verified:
        return f"verified {entry.verified[:10]}"
    return "yes" if entry.here else "no"


def _size(entry: ListedSet) -> str:
    if entry.download_bytes is None:
        return "use --from"
    return formatting.size(entry.download_bytes) if entry.download_bytes else "none"


def show_verified(console: Console, entries: Sequence[VerifiedSet]) -> None:
    """Print a line per data set that was verified again."""
    for entry in entries:
        packs = f"{entry.packs} {formatting.plural(entry.packs, 'pack')}"
        say(console, f"{entry.name}: {'DAMAGED' if entry.damage else 'intact'}, {packs} in {entry.folder}")


def show_fetched(console: Console, entries: Sequence[FetchedSet]) -> None:
    """Print a line per data set that was fetched."""
    for entry in entries:
        counts = f"{entry.classes:,} classes, {entry.images:,} images"
        say(console, f"{entry.name}: {counts}, digest {entry.digest:.12}, in {entry.folder}")


def show_names(console: Console, summaries: Mapping[str, str]) -> None:
    """Print names and what they mean, each on one line if the output is not a terminal."""
    left = max(map(len, summaries)) + 2
    for name, text in summaries.items():
        if console.is_terminal:
            say_description(console, (name, "bold"), text, left, min(console.width, WIDEST))
        else:
            say(console, name.ljust(left), text)


def show_data_sets(console: Console, entries: Sequence[ListedSet]) -> None:
    """Print a table, or a block of lines per data set if the terminal is too narrow for the table."""
    rows = [
        [entry.name, _state(entry), _size(entry), entry.licence, entry.origin, entry.what]
        for entry in entries
    ]
    if table_fits(console, [HEADS, *rows]):
        say_table(console, [HEADS, *rows], left=len(HEADS))
    else:
        for row in rows:
            say(console, (row[0], "bold"))
            for head, text in zip(HEADS[1:], row[1:], strict=True):
                say(console, (f"  {head:<13}", "dim"), text)
    say(console, f"prepared data sets are in {entries[0].folder}")
