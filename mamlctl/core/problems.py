"""Problems with settings, and helpers to word them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

Problem = tuple[str, str]  # the fact, the hint


def flag(name: str) -> str:
    """The flag of a setting: 'inner_lr' -> '--inner-lr'."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting: 'data_root' -> 'MAMLCTL_DATA_ROOT'."""
    return f"MAMLCTL_{name.upper()}"


def nearest(word: str, words: Iterable[str], *, otherwise: str) -> str:
    """A hint that names the closest of `words` to `word`, or the hint `otherwise` if none is close.

    Args:
        word: what the user wrote.
        words: the names that exist.
        otherwise: the hint if no name is similar.
    """
    # The dashes of flags would make any two of them similar.
    bare = {name.lstrip("-"): name for name in words}
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1)
    return f"did you mean '{bare[close[0]]}'?" if close else otherwise
