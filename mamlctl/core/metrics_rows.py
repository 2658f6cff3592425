"""What a row of metrics.jsonl needs, so that its readers can use its values without checks of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from mamlctl.core.literals import Metric, RowKind

# The version of metrics.jsonl: new fields may be added, but a field that is renamed, removed or gets another
# meaning makes a new version. docs/logging.md describes every field.
METRICS_VERSION = 1

# The least counts that a row of each kind needs: a report counts epochs from 0, a validation from 1.
COUNTS: dict[str, dict[str, int]] = {
    "report": {"step": 1, "epoch": 0},
    "validation": {"step": 1, "epoch": 1},
}
# A validation has one of them, which is null if it was not finite.
SCORES = {f"val_{metric}" for metric in get_args(Metric)}
TEXTS = {"kind", "bn"}
# `val_per_step` is in rows of older versions only.
LISTS = {"query_losses", "query_accuracies", "msl_weights", "val_per_step"}


def rows_of(metrics: Iterable[dict[str, Any]], kind: RowKind) -> list[dict[str, Any]]:
    """The rows of one kind."""
    return [row for row in metrics if row["kind"] == kind]


def steps_done(stored: int, metrics: Sequence[Mapping[str, Any]]) -> int:
    """The number of meta-steps done; `stored`, in status.json, is behind the rows if the run was killed."""
    return max([stored, *(int(row["step"]) for row in metrics[-1:])])


def is_damaged(row: Mapping[str, Any]) -> bool:
    """Whether a row lacks what its kind needs, or has a value of a type that is never written."""
    kind = row.get("kind")
    counts = COUNTS.get(kind) if isinstance(kind, str) else None
    if counts is None or not all(_is_count(row.get(key), least) for key, least in counts.items()):
        return True
    if kind == "report" and not (_is_number(row.get("tasks_per_second")) and row["tasks_per_second"] > 0):
        return True
    if kind == "validation" and not row.keys() & SCORES:
        return True
    rates = row.get("rates", {})
    if not isinstance(rates, dict) or not all(_is_row(rate) for rate in rates.values()):
        return True
    numbers = [value for key, value in row.items() if key not in (*TEXTS, "rates", *LISTS)]
    lists = [row[key] for key in row.keys() & LISTS]
    return not (all(value is None or _is_number(value) for value in numbers) and all(map(_is_row, lists)))


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and least <= value < 2**63


def _is_number(value: object) -> bool:
    """Whether a value is a finite number that 64 bits can represent."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _is_row(value: object) -> bool:
    return isinstance(value, list) and all(part is None or _is_number(part) for part in value)
