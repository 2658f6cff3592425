"""Numbers that papers and repositories print, found by the label of a row of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mamlctl.report.table import Published
from mamlctl.settings.schema import IMPROVEMENTS

FILE = Path(__file__).with_name("published.yaml")

# What a source calls a learner, where it is not what we call it.
OURS = {"nearest neighbour": "nearest", "pre-trained on all tasks": "transfer"}

EVERYTHING = frozenset({"maml", *IMPROVEMENTS})


@cache
def entries() -> Mapping[str, Any]:
    """The whole file: data set -> its sources."""
    sources: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return sources


def published(
    dataset: str,
    ways: int,
    shots: int,
    label: str,
    *,
    inner_steps: int | None = None,
    bn: str = "transductive",
) -> tuple[Published, ...]:
    """Find what is published for a row; often nothing.

    Args:
        dataset: a name in the file.
        ways: classes per task; 1 for curves, whose sources name none.
        shots: support examples per class.
        label: the row's label, such as "maml + msl".
        inner_steps: leaves out numbers of another number of steps; without it, the most steps come first.
        bn: puts numbers of that way to normalise first, where a paper has both.

    Returns:
        What comes nearest to the row first.
    """
    matches = [
        (_distance(row["row"], bn), source["paper"], row)
        for source in entries().get(dataset, ())
        if source.get("ways", ways) == ways and source["shots"] == shots
        for row in source["rows"]
        if parts(row["row"]) == parts(label) and inner_steps in (None, _steps(row["row"]) or inner_steps)
    ]
    # Papers normalise queries by their own statistics, unless they say so of each number.
    if bn in ("running", "support") and not any("transductive)" in row["row"] for _, _, row in matches):
        return ()
    # A stable sort: the file's order stands, in which MAML++'s re-run of MAML comes before MAML's own paper.
    return tuple(_published(paper, row) for _, paper, row in sorted(matches, key=lambda item: item[0]))


def parts(label: str) -> frozenset[str]:
    """A learner and the improvements it has, whatever their order and what is said about it.

    "maml + bnwb + bnrs (their re-run), 5 steps" -> {maml, bnrs, bnwb}; all six on maml are maml++.
    """
    name = re.split(r" \(|, ", label, maxsplit=1)[0].strip()
    learner_and_improvements = frozenset(part.strip() for part in OURS.get(name, name).split(" + "))
    return frozenset({"maml++"}) if learner_and_improvements == EVERYTHING else learner_and_improvements


def _steps(row: str) -> int | None:
    """The inner steps that a source's row names."""
    match = re.search(r", (\d+) steps?$", row)
    return int(match[1]) if match else None


def _distance(row: str, bn: str) -> tuple[bool, int]:
    other_way = "(non-transductive)" if bn == "transductive" else "(transductive)"
    return other_way in row, -(_steps(row) or 0)


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
