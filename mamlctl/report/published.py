"""Numbers that papers and repositories print, found by what a run of ours has learnt with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mamlctl.core.literals import BatchNormMode
from mamlctl.report.table import Published

FILE = Path(__file__).with_name("published.yaml")


@cache
def entries() -> Mapping[str, Any]:
    """The whole file: data set -> its sources."""
    sources: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return sources


def published(
    dataset: str,
    ways: int,
    shots: int,
    algo: str,
    improvements: Collection[str] = (),
    *,
    inner_steps: int | None = None,
    bn: BatchNormMode = "transductive",
) -> tuple[Published, ...]:
    """Find what is published for a learner; often nothing.

    Args:
        dataset: a name in the file.
        ways: classes per task; 1 for curves, whose sources name none.
        shots: support examples per class.
        algo: the algorithm, maml for maml++.
        improvements: those that are laid on it, in any order.
        inner_steps: leaves out numbers of another number of steps; without it, the most steps come first.
        bn: puts numbers of that way to normalise first, where a paper has both.

    Returns:
        What comes nearest to the row first.
    """
    matches = [
        (source["paper"], row)
        for source in entries().get(dataset, ())
        if source.get("ways", ways) == ways and source["shots"] == shots
        for row in source["rows"]
        if row["algo"] == algo and set(row.get("improvements", ())) == set(improvements)
        if inner_steps in (None, row.get("inner_steps", inner_steps))
    ]
    # Papers normalise queries by their own statistics, unless they say so of each number.
    if bn in ("running", "support") and not any("bn" in row for _, row in matches):
        return ()

    def distance(match: tuple[str, Mapping[str, Any]]) -> tuple[bool, int]:
        _, row = match
        is_transductive = row.get("bn", bn) == "transductive"
        return is_transductive != (bn == "transductive"), -row.get("inner_steps", 0)

    # A stable sort: the file's order stands, in which MAML++'s re-run of MAML comes before MAML's own paper.
    return tuple(_published(paper, row) for paper, row in sorted(matches, key=distance))


def _published(paper: str, row: Mapping[str, Any]) -> Published:
    is_accuracy, half = "acc" in row, row.get("pm")
    scale = 100 if is_accuracy else 1
    return Published(
        source=paper,
        row=row["row"],
        metric="accuracy" if is_accuracy else "mse",
        score=_scaled(row["acc" if is_accuracy else "mse"], scale),
        half_width=None if half is None else _scaled(half, scale),
        verified=row["seen"] == "transcript",
        note=row.get("note", ""),
    )


def _scaled(number: float, scale: int) -> float:
    """Percent as a share, without the last digits that a division would add."""
    return round(number / scale, 6)
