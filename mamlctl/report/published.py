"""Published results of papers and repositories, looked up by data set, task size and learner."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mamlctl.core.literals import BatchNormMode
from mamlctl.report.table import Published

FILE = Path(__file__).with_name("published.yaml")


@cache
def entries() -> Mapping[str, Any]:
    """The whole file: the sources of each data set."""
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
    """Look up the published results of a learner; often there are none.

    Args:
        dataset: a name in the file.
        ways: classes per task; 1 for regression, where the file has no ways.
        shots: support examples per class.
        algo: the algorithm; maml for maml++.
        improvements: the improvements that the learner adds to it, in any order.
        inner_steps: excludes results with another number of inner steps; None puts the most steps first.
        bn: puts results of this batch-norm mode first, where a paper has both.

    Returns:
        The results, the closest match first.
    """
    matches = [
        (paper, row)
        for paper, row in _rows(dataset, ways, shots)
        if row["algo"] == algo and set(row.get("improvements", ())) == set(improvements)
        if inner_steps in (None, row.get("inner_steps", inner_steps))
    ]
    # Papers normalise queries with their own statistics, unless they name the mode of each number.
    if bn in ("running", "support") and not any("bn" in row for _, row in matches):
        return ()

    def distance(match: tuple[str, Mapping[str, Any]]) -> tuple[bool, int]:
        _, row = match
        is_transductive = row.get("bn", bn) == "transductive"
        return is_transductive != (bn == "transductive"), -row.get("inner_steps", 0)

    # The sort is stable: among equals, the file's order puts MAML++'s re-run of MAML before MAML's own paper.
    return tuple(_published(paper, row) for paper, row in sorted(matches, key=distance))


def published_row(dataset: str, ways: int, shots: int, row: str) -> tuple[Published, int | None] | None:
    """Look up a published result by the words of its source.

    Args:
        dataset: a name in the file.
        ways: classes per task; 1 for regression.
        shots: support examples per class.
        row: the words of the source, e.g. "maml, 1 step".

    Returns:
        The first such result, with its number of inner steps if the source gives it; None if there is none.
    """
    named = ((paper, entry) for paper, entry in _rows(dataset, ways, shots) if entry["row"] == row)
    return next(((_published(paper, entry), entry.get("inner_steps")) for paper, entry in named), None)


def _rows(dataset: str, ways: int, shots: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The results of a task size in the order of the file, each with its paper."""
    for source in entries().get(dataset, ()):
        if source.get("ways", ways) == ways and source["shots"] == shots:
            yield from ((source["paper"], row) for row in source["rows"])


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
    """Divide without the rounding errors in the last digits."""
    return round(number / scale, 6)
