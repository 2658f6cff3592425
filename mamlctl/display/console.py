"""Lines, tables and JSON documents on a console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from mamlctl.core import formatting
from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import finite


def show_error(console: Console, error: MamlctlError) -> None:
    """The fact, then the way out."""
    say(console, ("error:", "bold red"), f" {error.message}")
    if error.hint:
        say(console, ("hint:", "bold cyan"), f"  {error.hint}")


def say_table(console: Console, rows: Sequence[Sequence[str]], *, left: int, widest: int = 0) -> None:
    """Aligned columns, the first `left` of them and all words to the left, under a dim head."""
    widths = [
        max(widest * (place >= left), *map(len, column))
        for place, column in enumerate(zip(*rows, strict=True))
    ]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if place >= left else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(console, ("  ".join(cells).rstrip(), "dim" if number == 0 else ""))


def write_json(stream: TextIO, document: Mapping[str, Any]) -> None:
    """One document on one line; a number that is not finite becomes null, which JSON has a word for."""
    stream.write(json.dumps(finite(document), allow_nan=False) + "\n")
    stream.flush()


def say(console: Console, *parts: str | tuple[str, str]) -> None:
    """One line, as it is: no markup, no highlighting, no wrapping; flushed by rich."""
    line = Text()
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        line.append(encodable(console, formatting.strip_controls(text)), style)
    console.print(line, soft_wrap=True)


def encodable(console: Console, text: str) -> str:
    """The text with a question mark for what the console's encoding lacks, such as ± in ASCII."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
