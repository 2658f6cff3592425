"""The estimated time of a grid, as a table and as a JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.core.results import Estimate
from mamlctl.display.console import say, say_table


def show_estimate(console: Console, estimate: Estimate) -> None:
    """Print a line per row of the grid, then the total."""
    heads = ["row", "meta-steps", "per meta-step", "training per cell", "testing per cell"]
    rows = [
        [
            row.row,
            f"{row.meta_steps:,}",
            formatting.duration(row.step_s),
            formatting.duration(row.train_s),
            formatting.duration(row.test_s),
        ]
        for row in estimate.rows
    ]
    say_table(console, [heads, *rows], left=1)
    say(console)
    cells = f"{estimate.cells} {formatting.plural(estimate.cells, 'cell')}"
    total = f"{cells}, {estimate.meta_steps:,} meta-steps"
    say(
        console,
        (f"{total}: about {formatting.duration(estimate.seconds)}", "bold"),
        f", {estimate.workers} at a time on {estimate.device}",
    )
    say(
        console,
        f"based on {estimate.timed} timed meta-steps of each kind, at this machine's current load",
    )


def estimate_document(estimate: Estimate) -> Mapping[str, Any]:
    """The estimate for `--json`, with all times in seconds."""
    return {"format": 1, **asdict(estimate)}
