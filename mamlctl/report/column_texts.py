"""The text, legend and footnotes of each column of a table of runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from mamlctl.core import formatting
from mamlctl.core.literals import HIGHER_IS_BETTER, Metric
from mamlctl.report.table import SIGNIFICANT, Row, Score, Table

RECALLED = "†"  # marks a published number that is quoted from memory
FROM_MEMORY = "quoted from memory, not verified"

PUBLISHED_LEGEND = (
    "published: as printed in the source, with its own length of training; its ± is not always a "
    f"95 % interval; {RECALLED}: {FROM_MEMORY}."
)

About = TypeVar("About")


def source_letters(table: Table) -> dict[str, str]:
    """Map each source of a shown published number to the letter of its footnote."""
    sources = dict.fromkeys(row.published[0].source for row in table.rows if row.published)
    return {source: letter(place) for place, source in enumerate(sources)}


def source_notes(table: Table) -> list[str]:
    """One footnote per source: its letter, its name, and the notes on its shown numbers."""
    entries = [row.published[0] for row in table.rows if row.published]
    notes = []
    for source, name in source_letters(table).items():
        remarks = [f"{entry.row}: {entry.note}" for entry in entries if entry.source == source and entry.note]
        notes.append(f"{name}: {'; '.join([source, *remarks])}.")
    return notes


def letter(place: int) -> str:
    """The name of a footnote: a to z, then a1, b1 ..."""
    return chr(ord("a") + place % 26) + str(place // 26 or "")


def unit(table: Table) -> str:
    return " %" if table.metric == "accuracy" else f" {table.metric}"


def resolve(part: str | Callable[[About], str], about: About) -> str:
    """A fixed text, or the text that the function returns for the table or row."""
    return part if isinstance(part, str) else part(about)


def seeds_text(table: Table, row: Row) -> str:
    score = row.best or row.ensemble
    scored = len(score.per_seed) if score else 0
    return str(scored) if scored == len(row.cells) else f"{scored} of {len(row.cells)}"


def where_rows_differ(value: Callable[[Row], object]) -> Callable[[Table, Row], str]:
    """Make a column text that shows the value of each row, or nothing if all rows have the same value."""
    return lambda table, row: str(value(row)) if len(set(map(value, table.rows))) > 1 else ""


def best_legend(table: Table) -> str:
    note = "" if table.metric in HIGHER_IS_BETTER else "; lower is better"
    return f"±: 95 % interval of the mean over seeds, for new tasks and these trained models{note}."


def score_text(metric: Metric, score: Score | None) -> str:
    """'97.43 ± 0.36'; the unit is in the column head."""
    return "" if score is None else formatting.score(metric, score.mean, score.ci95).removesuffix(" %")


def deviation_text(metric: Metric, score: Score | None) -> str:
    """'0.21', or nothing with one seed."""
    if score is None or score.deviation is None:
        return ""
    return f"{100 * score.deviation:.2f}" if metric == "accuracy" else f"{score.deviation:.3f}"


def _ensemble_sizes(table: Table) -> set[int]:
    return {row.ensemble_size for row in table.rows if row.ensemble}


def ensemble_head(table: Table) -> str:
    sizes = _ensemble_sizes(table)
    return f"ensemble{f'-{sizes.pop()}' if len(sizes) == 1 else ''}{unit(table)}"


def ensemble_text(table: Table, row: Row) -> str:
    size = f" ({row.ensemble_size})" if row.ensemble and len(_ensemble_sizes(table)) > 1 else ""
    return score_text(table.metric, row.ensemble) + size


def difference_text(table: Table, row: Row) -> str:
    """'+1.23 [+0.40, +2.06] *' in points or in mse, 'equal to maml', 'baseline', or nothing."""
    score = row.best
    if score is None or score.difference is None:
        return "baseline" if score and row.label == table.baseline else ""
    seeds = score.difference.seeds
    note = "" if seeds == table.most_seeds else f" ({seeds} {formatting.plural(seeds, 'seed')})"
    if score.difference.is_equal:
        return f"equal to {table.baseline}{note}"
    mean, low, high = (
        formatting.signed(table.metric, value)
        for value in (score.difference.mean, score.difference.low, score.difference.high)
    )
    return f"{mean} [{low}, {high}]{note}{' *' if score.is_significant else ''}"


def difference_legend(table: Table) -> str:
    has_one_seed = table.most_seeds < 2
    new = "new tasks only, because there is one seed" if has_one_seed else "new seeds and new tasks"
    differences = [row.best.difference for row in table.rows if row.best and row.best.difference]
    fewer = any(difference.seeds == 1 for difference in differences) and not has_one_seed
    note = "; with 1 seed, the interval is for new tasks only and there is no p" if fewer else ""
    return (
        f"difference: from {table.baseline} on the same tasks and seeds"
        f"{', in points' if table.metric == 'accuracy' else ''}, with a 95 % interval for {new}; "
        f"*: certain, p below {SIGNIFICANT} after Holm's correction across the rows{note}."
    )


def p_text(score: Score | None) -> str:
    """'0.012' or '<0.001'."""
    if score is None or score.p_holm is None or math.isnan(score.p_holm):
        return ""
    return "<0.001" if score.p_holm < 0.001 else f"{score.p_holm:.3f}"


def published_text(table: Table, row: Row) -> str:
    """'95.77 ± 0.38 a†': the number of source a, quoted from memory."""
    if not row.published:
        return ""
    entry = row.published[0]
    text = formatting.score(entry.metric, entry.score, entry.half_width).removesuffix(" %")
    return f"{text} {source_letters(table)[entry.source]}{'' if entry.verified else RECALLED}"
