"""What a grid will take, as words and as a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.core.results import Estimate
from mamlctl.display.console import say, say_table


def show_estimate(console: Console, estimate: Estimate) -> None:
    """A line per row of the grid, then the whole."""
    heads = ["row", "meta-steps", "a meta-step", "training a cell", "testing it"]
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
    pace = "one after the other" if estimate.workers == 1 else f"{estimate.workers} at a time"
    total = f"{estimate.cells} cells, {estimate.meta_steps:,} meta-steps"
    say(
        console,
        (f"{total}: about {formatting.duration(estimate.seconds)}", "bold"),
        f", {pace} on {estimate.device}",
    )
    say(console, f"from {estimate.timed} timed meta-steps of each kind on this machine as it is now")


def estimate_document(estimate: Estimate) -> Mapping[str, Any]:
    """The estimate for `--json`; all times in seconds."""
    return {"format": 1, **asdict(estimate)}
