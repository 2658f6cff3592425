"""Lines, tables and JSON documents on a console."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from mamlctl.core import formatting
from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import finite, naming

WIDEST = 100  # columns of running text: longer lines are hard to read
LEAST = 40  # columns of a description; on a narrower terminal it starts below its name
NARROW_LEFT = 6  # columns before it there


class _Stream:
    """A stream that does the same as another one, except in the methods of a subclass."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LenientStream(_Stream):
    """A stream whose output is discarded from the first write that fails."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)


class NamedStream(_Stream):
    """Standard output; an error of a write names it, since Python's own error names no file."""

    NAME = "standard output"

    def write(self, text: str) -> int:
        with naming(self.NAME):
            return self._stream.write(text)

    def flush(self) -> None:
        with naming(self.NAME):
            self._stream.flush()


def discard(stream: TextIO) -> None:
    """Send the rest of the stream's output, including what Python flushes at its exit, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def stderr_console() -> Console:
    """A console on stderr; if its reader has left, or its disk is full, the work continues without it."""
    return Console(file=cast(TextIO, _LenientStream(sys.stderr)))


def show_error(console: Console, error: MamlctlError) -> None:
    """Print the fact, then the hint."""
    say(console, ("error:", "bold red"), f" {error.message}")
    if error.hint:
        say(console, ("hint:", "bold cyan"), f"  {error.hint}")


def say_table(console: Console, rows: Sequence[Sequence[str]], *, left: int, min_width: int = 0) -> None:
    """Print a dim head line and rows in aligned columns.

    rich's Table prints the same, but takes 54 to 58 ms instead of 7 ms for 65 rows of 6 columns, and 9 to
    13 ms for its import (medians of 21 and of 5, on one busy core).

    Args:
        console: where to print.
        rows: the head, then the other rows; all of one length.
        left: number of columns that are aligned left; the others are aligned right.
        min_width: of the columns aligned right, in characters.
    """
    rows = [[formatting.one_line(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        texts = [text.ljust(width) for text, width in zip(row[:left], widths, strict=False)]
        texts += [
            text.rjust(max(width, min_width)) for text, width in zip(row[left:], widths[left:], strict=True)
        ]
        say(console, ("  ".join(texts).rstrip(), "dim" if number == 0 else ""))


def table_fits(console: Console, rows: Sequence[Sequence[str]]) -> bool:
    """Whether no line of a table is wider than the terminal; always true without one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return not console.is_terminal or sum(widths) + 2 * len(widths) <= console.width


def say_description(console: Console, name: tuple[str, str], text: str, left: int, width: int) -> None:
    """Print a name and its description beside it, or below it if one of them is too wide.

    Args:
        console: where to print.
        name: the name and its style.
        text: the description.
        left: columns before the description.
        width: columns of the whole.
    """
    if width - left < LEAST:
        left = NARROW_LEFT
    lines = textwrap.wrap(text, width - left, break_on_hyphens=False)
    word, style = name
    if len(word) + 1 < left:
        say(console, (word.ljust(left), style), lines.pop(0))
    else:
        say(console, name)
    for line in lines:
        say(console, " " * left + line)


def write_json(stream: TextIO, document: Mapping[str, Any]) -> None:
    """Write a document on one line; numbers that are not finite become null, since JSON has no NaN."""
    stream.write(json.dumps(finite(document), allow_nan=False) + "\n")
    stream.flush()


def write_text(stream: TextIO, text: str) -> None:
    """Write text; characters that the stream's encoding lacks become '?'."""
    stream.write(encodable(stream.encoding or "utf-8", text))
    stream.flush()


def say(console: Console, *parts: str | tuple[str, str]) -> None:
    """Print one line without interpreting markup, highlighting or wrapping it."""
    line = Text()
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        line.append(encodable(console.encoding, formatting.strip_controls(text)), style)
    console.print(line, soft_wrap=True)


def encodable(encoding: str, text: str) -> str:
    """Replace characters that the encoding lacks, such as ± in ASCII, with '?'."""
    return text.encode(encoding, "replace").decode(encoding)
