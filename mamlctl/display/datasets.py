"""The data sets of `fetch`: a table of them, and a line about one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.display.console import say, say_table

HEADS = ["name", "here", "download", "licence", "from", "what"]


def _data_set_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for the heads, then one for each data set."""
    rows = [
        [
            entry["name"],
            _state(entry),
            _size(entry),
            entry["licence"],
            entry["origin"],
            entry["what"],
        ]
        for entry in entries
    ]
    return [HEADS, *rows]


def _state(entry: Mapping[str, Any]) -> str:
    if entry["damage"]:
        return "damaged"
    if entry["verified"]:
        return f"verified {entry['verified'][:10]}"
    return "yes" if entry["here"] else "no"


def _size(entry: Mapping[str, Any]) -> str:
    count = entry["download_bytes"]
    if count is None:
        return "by --from"
    return formatting.size(count) if count else "none"


def verified_line(entry: Mapping[str, Any]) -> str:
    """The outcome for one data set that was verified again."""
    packs = f"{entry['packs']} {formatting.plural(entry['packs'], 'pack')}"
    return f"{entry['name']}: {'DAMAGED' if entry['damage'] else 'whole'}, {packs} in {entry['folder']}"


def fetched_line(entry: Mapping[str, Any]) -> str:
    """The outcome for one data set that was fetched."""
    return "{name}: {classes} classes, {images} images, digest {digest:.12}, in {folder}".format(**entry)


def show_data_sets(console: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """A table, or where the terminal is too narrow for it, a block of lines for each data set."""
    heads, *rows = _data_set_rows(entries)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if not console.is_terminal or sum(widths) + 2 * len(widths) <= console.width:
        say_table(console, [heads, *rows], left=len(heads))
    else:
        for row in rows:
            say(console, (row[0], "bold"))
            for head, text in zip(heads[1:], row[1:], strict=True):
                say(console, (f"  {head:<10}", "dim"), text)
    say(console, f"prepared data sets lie in {entries[0]['folder']}")
