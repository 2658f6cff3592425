"""Settings problems: the fact, the way out, and how flags are spelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

Problem = tuple[str, str]  # the fact, the way out


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def nearest(word: str, words: Iterable[str], *, otherwise: str) -> str:
    """A hint that names the one of `words` closest to `word`, or says `otherwise`."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else otherwise
