"""The verdict of a table: what its paired differences from the baseline support, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mamlctl.core import formatting
from mamlctl.core.literals import HIGHER_IS_BETTER, METRIC_NAMES
from mamlctl.report.column_texts import p_text, score_text, unit
from mamlctl.report.table import Row, Score, Table

if TYPE_CHECKING:
    from mamlctl.core.statistics import Difference

NAMED = 6  # rows that one sentence names; the table marks the others


def verdict(table: Table) -> list[str]:
    """The verdict in one sentence, then what a reader must know about it, one sentence each.

    It is about the single best checkpoints. A difference is certain if its p, corrected across the rows of
    the table, is below 0.05 and its 95 % interval excludes 0. Rows are compared with the baseline only, so
    no sentence ranks two other rows.
    """
    baseline = table.baseline_row
    others = [row for row in table.rows if row is not baseline]
    measured = [row for row in others if baseline.best and row.best and row.best.difference]
    different = [row for row in measured if not _difference(row).is_equal]
    different.sort(key=lambda row: _difference(row).mean, reverse=table.metric in HIGHER_IS_BETTER)
    certain = [row for row in different if _is_certain(row.best)]
    if not measured:
        sentences = [_no_comparison(table, baseline, others)]
    elif not different:
        seeds = _seeds(measured[0], _difference(measured[0]).seeds)
        verb = "equals" if len(measured) == 1 else "equal"
        sentences = [f"No difference: {_names(measured)} {verb} {table.baseline} on every task, {seeds}"]
    elif not certain:
        sentences = [_nothing_certain(table, different, len(measured))]
    else:
        sentences = [_certain_differences(table, certain, len(measured))]
        sentences += _best(table, different, certain) if len(measured) > 1 else []
    sentences += _limits(table, others, measured if different else [])
    return [" ".join(formatting.strip_controls(sentence).split()) + "." for sentence in sentences]


def _difference(row: Row) -> Difference:
    assert row.best is not None and row.best.difference is not None  # `verdict` selects the rows with one
    return row.best.difference


def _is_certain(score: Score | None) -> bool:
    if score is None or score.difference is None:
        return False
    return score.is_significant and (score.difference.low > 0 or score.difference.high < 0)


def _is_better(table: Table, row: Row) -> bool:
    mean = _difference(row).mean
    return mean > 0 if table.metric in HIGHER_IS_BETTER else mean < 0


def _no_comparison(table: Table, baseline: Row, others: Sequence[Row]) -> str:
    if baseline.best is None:
        return f"No comparison: the baseline {baseline.label} has no score"
    if any(row.best for row in others):
        return f"No comparison: no row was tested with the same seed as the baseline {baseline.label}"
    reason = "no other row has a score" if others else "the table has one row"
    score, seeds = score_text(table.metric, baseline.best), _seeds(baseline, len(baseline.best.per_seed))
    return f"No comparison: {reason}; {baseline.label} has {score}{unit(table)}, {seeds}"


def _nothing_certain(table: Table, different: Sequence[Row], measured: int) -> str:
    """The verdict on rows of which none differs with certainty, the best first, and on equal ones."""
    best = different[0]
    if measured == 1:
        return f"No certain difference: {_comparison(table, best.label, best)}"
    subject = f"the best of them, {best.label},"
    if len(different) < measured and not _is_better(table, best):  # then the equal rows are better
        rest = len(different)
        group = f"best of the {rest} rows that do" if rest > 1 else "one row that does"
        subject = f"the {group} not equal it, {best.label},"
    return (
        f"No certain difference from {table.baseline} in {measured} rows: {_comparison(table, subject, best)}"
    )


def _certain_differences(table: Table, certain: Sequence[Row], measured: int) -> str:
    """The verdict on rows that differ with certainty, the best first, out of all measured ones."""
    best, scope = certain[0], " for these trained models" if table.most_seeds == 1 else ""
    if measured == 1:
        return f"Certain difference{scope}: {_comparison(table, best.label, best)}"
    subject = best.label if len(certain) == 1 else f"the best of these, {best.label},"
    head = f"Certain {formatting.plural(len(certain), 'difference')} from {table.baseline}{scope}"
    return f"{head} in {len(certain)} of {measured} rows: {_comparison(table, subject, best)}"


def _best(table: Table, different: Sequence[Row], certain: Sequence[Row]) -> Iterator[str]:
    """The rows with certain differences by name, and whether the best mean is one of them."""
    if len(certain) > 1:
        for is_better, word in ((True, "Better"), (False, "Worse")):
            rows = [row for row in certain if _is_better(table, row) == is_better]
            if rows:
                yield f"{word} than {table.baseline}: {_names(rows)}"
    best = different[0]
    if not _is_better(table, best):
        yield f"No row has a better mean than {table.baseline}"
    elif best is not certain[0]:
        yield f"The best mean is not certain: {_comparison(table, best.label, best)}"
    elif len(different) > 1:
        yield f"{best.label} has the best mean, but it was compared with {table.baseline} only"


def _limits(table: Table, others: Sequence[Row], measured: Sequence[Row]) -> Iterator[str]:
    """What limits the verdict: too few seeds, equal rows, rows that could not be compared."""
    if measured and table.most_seeds == 1:
        yield "One seed does not show how much newly trained models would differ"
    groups = {
        f"Equal to {table.baseline} on every task": [row for row in measured if _difference(row).is_equal],
        "One seed, so never certain here": [
            row
            for row in measured
            if table.most_seeds > 1 and _difference(row).seeds == 1 and not _difference(row).is_equal
        ],
        f"No seed in common with {table.baseline}": [
            row for row in others if row.best and not row.best.difference and measured
        ],
        "No score": [row for row in others if not row.best],
        "Certain for the ensemble only": [
            row for row in others if _is_certain(row.ensemble) and not _is_certain(row.best)
        ],
    }
    for head, rows in groups.items():
        if rows:
            yield f"{head}: {_names(rows)}"


def _comparison(table: Table, subject: str, row: Row) -> str:
    """'maml++ is 3.36 points above maml, interval -0.22 to +6.93, p 0.435, 3 seeds'.

    Args:
        table: the whole table.
        subject: the words for the row at the start.
        row: the row, which has a difference.
    """
    difference, baseline = _difference(row), table.baseline
    mean, low, high = (
        formatting.signed(table.metric, value) for value in (difference.mean, difference.low, difference.high)
    )
    side = "below" if mean.startswith("-") else "above"
    amount = f"{mean.lstrip('+-')} points {side} {baseline}"
    if table.metric != "accuracy":
        word = "better" if _is_better(table, row) else "worse"
        amount = f"{mean.lstrip('+-')} {side} {baseline} in {METRIC_NAMES[table.metric]} ({word})"
    p = p_text(row.best)
    scope = " for new tasks only" if difference.seeds == 1 else ""
    parts = [f"{subject} is {amount}", f"interval {low} to {high}{scope}", f"p {p}" if p else ""]
    return ", ".join([*filter(None, parts), _seeds(row, difference.seeds)])


def _seeds(row: Row, count: int) -> str:
    """'3 seeds', or '2 of 3 seeds' if some runs do not count."""
    total = len(row.cells)
    return f"{count if count == total else f'{count} of {total}'} {formatting.plural(total, 'seed')}"


def _names(rows: Sequence[Row]) -> str:
    """The labels of the rows; of many, only the first ones."""
    more = [f"and {len(rows) - NAMED} more"] if len(rows) > NAMED else []
    return ", ".join([*(row.label for row in rows[:NAMED]), *more])
