"""The guard of `--fail-under` and `--fail-over`, on results with invented numbers."""

import math
from dataclasses import replace

import pytest
from helpers.table_cases import EVAL_ROW, curves, one_on

from mamlctl.core.errors import ExitCode, MamlctlError
from mamlctl.core.results import EvalResult
from mamlctl.report.guard import Limit, check_evaluation, check_table
from mamlctl.run_folder import RunState

FINISHED = RunState("finished", 100)


def evaluation(score, metric="accuracy"):
    """An evaluation whose best model has this score, and whose ensemble has another one."""
    best = replace(EVAL_ROW, metric=metric, score=score)
    rows = (best, replace(best, model="ensemble-4", kind="ensemble", score=1 - score))
    return EvalResult("runs/demo", "glyphs", "maml++", "runs/demo/eval/test-1", 2.0, rows)


def refusal(check, *arguments):
    """The error of a check that does not pass."""
    with pytest.raises(MamlctlError) as caught:
        check(*arguments)
    assert caught.value.exit_code == ExitCode.FAILED
    return caught.value


@pytest.mark.parametrize(
    ("metric", "limit", "score"),
    [
        ("accuracy", 89.27, 0.8927),
        ("accuracy", 95, math.fsum([0.95] * 3) / 3),
        ("accuracy", 95, 0.9499999999999998),  # 95 % but for the last bits of a mean
        ("accuracy", 100, 1.0),
        ("mse", 0.333, 0.333),
        ("mse", 0.333, 0.1),
    ],
)
def test_a_score_that_reaches_the_limit_passes(metric, limit, score):
    check_evaluation(evaluation(score, metric), FINISHED, Limit(metric, limit))


@pytest.mark.parametrize(
    ("metric", "limit", "score", "fact"),
    [
        ("accuracy", 95, 0.8927, "runs/demo has 89.27 %, but the limit is --fail-under 95 %"),
        ("accuracy", 99.5, 0.99496, "runs/demo has 99.496 %, but the limit is --fail-under 99.5 %"),
        ("accuracy", 95, 0.9499999, "runs/demo has 94.99999 %, but the limit is --fail-under 95 %"),
        ("mse", 0.3, 0.3331, "runs/demo has 0.333, but the limit is --fail-over 0.3"),
        ("mse", 0.333, 0.33312, "runs/demo has 0.3331, but the limit is --fail-over 0.333"),
        ("accuracy", 1, math.nan, "runs/demo has a score that is not finite, but"),
        ("mse", 1e9, math.inf, "runs/demo has a score that is not finite, but"),
    ],
)
def test_a_score_beyond_the_limit_is_refused_with_two_numbers_that_differ(metric, limit, score, fact):
    error = refusal(check_evaluation, evaluation(score, metric), FINISHED, Limit(metric, limit))
    assert error.message.startswith(fact)
    assert error.hint.endswith("lower --fail-under" if metric == "accuracy" else "raise --fail-over")


@pytest.mark.parametrize(
    ("state", "fact"),
    [
        (RunState("diverged", 120, "the loss is nan", 121), "runs/demo diverged at meta-step 121, but"),
        (RunState("diverged", 120), "runs/demo diverged, but the limit is --fail-under 50 %"),
        (RunState("failed", 120, "the disk is full"), "runs/demo failed: the disk is full, but"),
    ],
)
def test_a_run_that_diverged_or_failed_is_refused_whatever_its_score(state, fact):
    error = refusal(check_evaluation, evaluation(0.99), state, Limit("accuracy", 50))
    assert error.message.startswith(fact)
    assert error.hint == "train longer or with other settings", "a lower limit does not help"


@pytest.mark.parametrize("status", ["finished", "interrupted", "running", None])
def test_an_unfinished_run_is_judged_by_its_score(status):
    check_evaluation(evaluation(0.99), RunState(status, 50), Limit("accuracy", 99))


def with_means(table, means):
    """A table whose best models have these means; a row without a score keeps none."""
    rows = [
        replace(row, best=row.best and replace(row.best, mean=mean))
        for row, mean in zip(table.rows, means, strict=True)
    ]
    return replace(table, rows=tuple(rows))


def test_a_table_names_every_row_that_does_not_pass():
    """Row 4 has diverged, row 2 lacks one seed, and row 7 has a failed run."""
    table = with_means(one_on(), [0.90, 0.91, 0.97, 0.96, None, 0.95, 0.9499, 0.97, 0.98])
    assert refusal(check_table, table, Limit("accuracy", 95)).message.splitlines() == [
        "6 of 9 rows do not reach --fail-under 95 %",
        "  maml has 90.00 %",
        "  maml + msl has 91.00 %",
        "  maml + da is tested for 2 of 3 seeds",
        "  maml + bnwb diverged with seed 0 at meta-step 121",
        "  maml + lslr has 94.99 %",
        "  maml + ca failed with seed 0: out of memory",
    ]


def test_a_table_passes_if_every_row_reaches_the_limit():
    table = one_on()
    whole = replace(table, rows=tuple(row for place, row in enumerate(table.rows) if place not in (2, 4, 7)))
    whole = with_means(whole, [0.90, 0.91, 0.92, 0.93, 0.94, 0.95])
    check_table(whole, Limit("accuracy", 90))
    assert refusal(check_table, whole, Limit("accuracy", 90.5)).message.startswith("maml has 90.00 %, but")
    untested = replace(whole, rows=(replace(whole.rows[0], best=None),))
    assert "maml is tested for 0 of 3 seeds" in refusal(check_table, untested, Limit("accuracy", 1)).message


def test_the_error_of_curves_must_not_exceed_the_limit():
    table = with_means(curves(), [0.34, 2.42])
    assert refusal(check_table, table, Limit("mse", 0.5)).message.startswith("transfer has 2.420, but")
    check_table(table, Limit("mse", 2.42))
