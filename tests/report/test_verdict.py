"""The verdict claims no more than the intervals and p values of the table support."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.pages import DOCS, code_blocks
from helpers.stored_tables import stored_table
from helpers.table_cases import TABLES, curves, difference, empty, full, one_on

from mamlctl.core.statistics import holm
from mamlctl.report.export import to_markdown
from mamlctl.report.verdict import verdict


def judged(*differences, seeds=3, given=None):
    """A table with one row per (mean, half width, p) of a difference; None: equal to the baseline."""
    table = one_on() if given is None else given
    first, *rows = (row for row in table.rows if row.best and len(row.best.per_seed) == len(row.cells))
    cells, per_seed = first.cells[:seeds], first.best.per_seed[:seeds]
    first = replace(first, cells=cells, best=replace(first.best, per_seed=per_seed))
    corrected = holm([p for _, _, p in (each or (0, 0, 1.0) for each in differences)])
    judged_rows = []
    for row, each, p_holm in zip(rows, differences, corrected, strict=False):
        mean, width, p = each or (0.0, 0.0, 1.0)
        found = replace(difference(mean, p, seeds=seeds, width=width), is_equal=each is None)
        best = replace(row.best, difference=found, p_holm=p_holm, per_seed=per_seed)
        label = f"row {len(judged_rows) + 1}"
        judged_rows.append(replace(row, label=label, cells=cells, best=best, ensemble=None))
    return replace(table, rows=(first, *judged_rows))


HIGHER, LOWER = (0.064, 0.008, 0.0004), (-0.03, 0.01, 0.002)
UNCERTAIN = (0.0336, 0.0358, 0.056)

SENTENCES = {
    "one row, not certain": (
        judged(UNCERTAIN),
        [
            "No certain difference: row 1 is 3.36 points above maml, "
            "interval -0.22 to +6.94, p 0.056, 3 seeds."
        ],
    ),
    "one row, certain and worse": (
        judged(LOWER),
        ["Certain difference: row 1 is 3.00 points below maml, interval -4.00 to -2.00, p 0.002, 3 seeds."],
    ),
    "no row is certain": (
        judged((-0.02, 0.03, 0.1), UNCERTAIN),
        [
            "No certain difference from maml in 2 rows: the best of them, row 2, is 3.36 points above maml, "
            "interval -0.22 to +6.94, p 0.112, 3 seeds."
        ],
    ),
    # Its interval alone would be a difference, but two rows were tried.
    "not certain after the correction": (
        judged((0.0351, 0.021, 0.03), (-0.01, 0.02, 0.3)),
        [
            "No certain difference from maml in 2 rows: the best of them, row 1, is 3.51 points above maml, "
            "interval +1.41 to +5.61, p 0.060, 3 seeds."
        ],
    ),
    "better and worse": (
        judged(HIGHER, LOWER, UNCERTAIN),
        [
            "Certain differences from maml in 2 of 3 rows: the best of these, row 1, is 6.40 points above "
            "maml, interval +5.60 to +7.20, p 0.001, 3 seeds.",
            "Better than maml: row 1.",
            "Worse than maml: row 2.",
            "row 1 has the best mean, but it was compared with maml only.",
        ],
    ),
    "the best row is not certain": (
        judged(UNCERTAIN, LOWER),
        [
            "Certain difference from maml in 1 of 2 rows: row 2 is 3.00 points below maml, "
            "interval -4.00 to -2.00, p 0.004, 3 seeds.",
            "The best mean is not certain: row 1 is 3.36 points above maml, "
            "interval -0.22 to +6.94, p 0.056, 3 seeds.",
        ],
    ),
    "all rows are worse": (
        judged(LOWER, (-0.05, 0.01, 0.001)),
        [
            "Certain differences from maml in 2 of 2 rows: the best of these, row 1, is 3.00 points below "
            "maml, interval -4.00 to -2.00, p 0.002, 3 seeds.",
            "Worse than maml: row 1, row 2.",
            "No row has a better mean than maml.",
        ],
    ),
    "one seed, certain": (
        judged(HIGHER, seeds=1),
        [
            "Certain difference for these trained models: row 1 is 6.40 points above maml, "
            "interval +5.60 to +7.20 for new tasks only, p <0.001, 1 seed.",
            "One seed does not show how much newly trained models would differ.",
        ],
    ),
    "equal runs": (judged(None), ["No difference: row 1 equals maml on every task, 3 seeds."]),
    "equal and other runs": (
        judged(None, UNCERTAIN),
        [
            "No certain difference from maml in 2 rows: the best of them, row 2, is 3.36 points above maml, "
            "interval -0.22 to +6.94, p 0.112, 3 seeds.",
            "Equal to maml on every task: row 1.",
        ],
    ),
    "equal and lower runs": (
        judged(None, (-0.02, 0.03, 0.1), (-0.01, 0.03, 0.3)),
        [
            "No certain difference from maml in 3 rows: the best of the 2 rows that do not equal it, row 3, "
            "is 1.00 points below maml, interval -4.00 to +2.00, p 0.600, 3 seeds.",
            "Equal to maml on every task: row 1.",
        ],
    ),
    "one lower run, and an equal one": (
        judged(None, (-0.01, 0.03, 0.3)),
        [
            "No certain difference from maml in 2 rows: the one row that does not equal it, row 2, "
            "is 1.00 points below maml, interval -4.00 to +2.00, p 0.600, 3 seeds.",
            "Equal to maml on every task: row 1.",
        ],
    ),
    "errors": (
        curves(),
        [
            "Certain difference for these trained models: transfer is 2.080 above maml in mean squared error "
            "(worse), interval +1.880 to +2.280 for new tasks only, p <0.001, 1 seed.",
            "One seed does not show how much newly trained models would differ.",
        ],
    ),
    "the baseline has no score": (
        replace(one_on(), baseline="maml + bnwb", rows=(one_on().rows[4], *one_on().rows[:2])),
        ["No comparison: the baseline maml + bnwb has no score."],
    ),
    "one row in the table": (
        replace(one_on(), rows=one_on().rows[:1]),
        ["No comparison: the table has one row; maml has 89.99 ± 0.34 %, 3 seeds."],
    ),
    "no other row has a score": (
        replace(one_on(), rows=(one_on().rows[0], one_on().rows[4])),
        [
            "No comparison: no other row has a score; maml has 89.99 ± 0.34 %, 3 seeds.",
            "No score: maml + bnwb.",
        ],
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_verdict_states_what_the_table_supports(name):
    table, sentences = SENTENCES[name]
    assert verdict(table) == sentences


def test_an_error_below_the_baseline_is_better():
    rows = curves().rows
    lower = replace(rows[1].best, difference=difference(-0.1, 1e-9, seeds=1, width=0.02), p_holm=1e-9)
    first = verdict(replace(curves(), rows=(rows[0], replace(rows[1], best=lower))))[0]
    assert "transfer is 0.100 below maml in mean squared error (better), interval -0.120 to -0.080" in first


def test_runs_that_do_not_count_are_counted():
    sentences = verdict(one_on())
    assert sentences[-1] == "No score: maml + bnwb."
    part = replace(one_on(), rows=(one_on().rows[0], one_on().rows[2]))
    seeds = replace(part.rows[1].best.difference, seeds=2)
    part = replace(
        part, rows=(part.rows[0], replace(part.rows[1], best=replace(part.rows[1].best, difference=seeds)))
    )
    assert verdict(part)[0].endswith(", 2 of 3 seeds.")


def test_a_row_without_a_common_seed_or_with_one_seed_is_never_judged():
    table = judged(HIGHER, UNCERTAIN, UNCERTAIN)
    first, one, other, third = table.rows
    one = replace(one, best=replace(one.best, difference=replace(one.best.difference, seeds=1), p_holm=None))
    other = replace(other, best=replace(other.best, difference=None, p_holm=None))
    sentences = verdict(replace(table, rows=(first, one, other, third)))
    assert sentences[0].startswith(
        "No certain difference from maml in 2 rows: the best of them, row 1, is 6.40 "
    )
    assert sentences[0].endswith(", interval +5.60 to +7.20 for new tasks only, 1 of 3 seeds.")
    assert sentences[1:] == ["One seed, so never certain here: row 1.", "No seed in common with maml: row 2."]
    alone = verdict(replace(table, rows=(first, other)))
    assert alone == ["No comparison: no row was tested with the same seed as the baseline maml."]


def test_many_rows_are_counted_and_the_first_ones_named():
    sentences = verdict(full())
    assert "in 56 of 63 rows" in sentences[0]
    assert sentences[1].endswith(", and 50 more.")
    assert max(map(len, sentences)) < 400


@pytest.mark.parametrize("low", [-0.002, 0.002])
@pytest.mark.parametrize("p_holm", [None, float("nan"), 0.04, 0.06])
def test_certain_needs_both_the_interval_and_the_corrected_p(low, p_holm):
    table = judged((0.01, 0.01 - low, 0.03))
    best = replace(table.rows[1].best, p_holm=p_holm)
    table = replace(table, rows=(table.rows[0], replace(table.rows[1], best=best)))
    certain = low > 0 and p_holm == 0.04
    assert verdict(table)[0].startswith("Certain difference: " if certain else "No certain difference: ")


@pytest.mark.parametrize("name", TABLES)
def test_the_verdict_counts_the_marked_rows_and_is_in_the_markdown(name):
    table = TABLES[name]()
    sentences = verdict(table)
    marked = sum(row.best is not None and row.best.is_significant for row in table.rows)
    assert sentences[0].startswith("Certain") == (marked > 0)
    assert all("\n" not in sentence and "\x1b" not in sentence for sentence in sentences)
    assert (
        sentences[0].replace("<", r"\<").split(",")[0].split("<")[0] in to_markdown(table)
        or name == "hostile"
    )


def test_an_ensemble_that_differs_alone_is_named():
    table = judged(UNCERTAIN, HIGHER)
    first, one, other = table.rows
    rows = (first, replace(one, ensemble=other.best), replace(other, ensemble=other.best))
    assert verdict(replace(table, rows=rows))[-1] == "Certain for the ensemble only: row 1."


def test_the_documented_verdict_is_that_of_the_stored_table():
    blocks = code_blocks((DOCS / "statistics.md").read_text())
    expected = " ".join(verdict(stored_table("omniglot-5w1s-one-on")))
    assert expected in [" ".join(block.split()) for block in blocks]


def test_a_table_before_the_first_run_has_no_comparison():
    assert verdict(empty())[0] == "No comparison: the baseline maml has no score."
