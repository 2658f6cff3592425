"""What `fetch` found, as words for a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mamlctl import words

HEADS = ["name", "here", "download", "licence", "from", "what"]


def data_set_cells(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for the heads, then one for each data set."""
    rows = [
        [entry["name"], _state(entry), _size(entry), entry["licence"], entry["origin"], entry["what"]]
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
    return "by --from" if count is None else words.size(count) if count else "none"


def verified_line(entry: Mapping[str, Any]) -> str:
    """One data set that was verified again."""
    packs = f"{entry['packs']} pack{'' if entry['packs'] == 1 else 's'}"
    return f"{entry['name']}: {'DAMAGED' if entry['damage'] else 'whole'}, {packs} in {entry['folder']}"


def fetched_line(entry: Mapping[str, Any]) -> str:
    """One data set that was fetched."""
    return "{name}: {classes} classes, {images} images, digest {digest:.12}, in {folder}".format(**entry)
