"""Statistics against scipy, slow loops and closed forms, and the coverage of their intervals."""

import itertools
import math
import warnings
from dataclasses import asdict, astuple

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mamlctl.core.statistics import (
    bootstrap95,
    crossed_t,
    difference,
    holm,
    mean_ci95,
    over_seeds,
    paired_t,
    permutation_p,
)

EXPERIMENTS = 1000
# Three standard deviations of a share of 1,000 experiments whose true value is 5 %.
ERROR = 3 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)


def scores(seed=0, seeds=3, tasks=40):
    """The scores of a row and its baseline on common seeds and tasks, as seeds x tasks."""
    generator = np.random.default_rng(seed)
    common_T = 0.6 + 0.2 * generator.normal(size=tasks)
    row_ST, baseline_ST = common_T + 0.1 * generator.normal(size=(2, seeds, tasks))
    return row_ST + 0.05 * generator.normal(size=(seeds, 1)), baseline_ST


def crossed(generator, seeds, tasks, by_seed, by_task, residual):
    """Differences with a true mean of 0: deviations by seed, by task and of the residual."""
    normal = generator.normal
    of_seed, of_task = by_seed * normal(size=(seeds, 1)), by_task * normal(size=tasks)
    return of_seed + of_task + residual * normal(size=(seeds, tasks))


def test_over_seeds_equals_the_standard_library():
    import statistics

    values = [0.5, 0.75, 0.25, 0.875]
    assert over_seeds(values) == (statistics.mean(values), pytest.approx(statistics.stdev(values), rel=1e-15))
    assert over_seeds([0.5]) == (0.5, None)


@pytest.mark.parametrize(("wider", "deviations"), [("both", (0.1, 0.3, 0.1)), ("seeds", (0.2, 0.1, 0.05))])
def test_mean_squares_and_degrees_of_freedom_equal_a_slow_loop(wider, deviations):
    """The result is the wider interval: of both effects, or of the seeds only."""
    d = 0.02 + crossed(np.random.default_rng(1), 4, 7, *deviations)
    seeds, tasks = range(4), range(7)
    mean = sum(d[s, t] for s in seeds for t in tasks) / 28
    row = [sum(d[s, t] for t in tasks) / 7 for s in seeds]
    column = [sum(d[s, t] for s in seeds) / 4 for t in tasks]
    by_seed = sum((row[s] - mean) ** 2 for s in seeds for t in tasks) / 3
    by_task = sum((column[t] - mean) ** 2 for s in seeds for t in tasks) / 6
    residual = sum((d[s, t] - row[s] - column[t] + mean) ** 2 for s in seeds for t in tasks) / 18
    assert by_seed > residual < by_task  # so that no floor applies
    variance = by_seed + by_task - residual
    df = variance**2 / (by_seed**2 / 3 + by_task**2 / 6 + residual**2 / 18)
    square, degrees = {"both": (variance, df), "seeds": (by_seed, 3)}[wider]
    half = scipy_stats.t.ppf(0.975, degrees) * math.sqrt(square / 28)
    p = 2 * scipy_stats.t.sf(abs(mean) / math.sqrt(variance / 28), df)
    p = max(p, scipy_stats.ttest_1samp(row, 0).pvalue)
    np.testing.assert_allclose(crossed_t(d), (mean - half, mean + half, p, degrees), rtol=1e-12)


@pytest.mark.parametrize("along", ["seeds", "tasks"])
def test_the_interval_is_a_t_test_if_only_seeds_or_only_tasks_have_an_effect(along):
    values = np.random.default_rng(2).normal(0.3, 1, 9)
    d = np.tile(values[:, None], 20) if along == "seeds" else np.tile(values, (3, 1))
    want = scipy_stats.ttest_1samp(values, 0)
    low, high = want.confidence_interval()
    np.testing.assert_allclose(crossed_t(d), (low, high, want.pvalue, 8), rtol=1e-12)


def test_one_seed_gives_the_paired_t_test_over_tasks():
    row, baseline = scores(seeds=1)
    result, want = difference(row, baseline), scipy_stats.ttest_rel(row[0], baseline[0])
    low, high = want.confidence_interval()
    np.testing.assert_allclose(
        (result.low, result.high, result.p, result.df), (low, high, want.pvalue, 39), rtol=1e-12
    )
    np.testing.assert_allclose(
        (result.tasks_low, result.tasks_high, result.tasks_p), (low, high, want.pvalue)
    )


def test_interval_over_tasks_equals_scipy_paired_t_of_the_mean_over_seeds():
    row, baseline = scores()
    result, want = difference(row, baseline), scipy_stats.ttest_rel(row.mean(0), baseline.mean(0))
    low, high = want.confidence_interval()
    np.testing.assert_allclose(
        (result.tasks_low, result.tasks_high, result.tasks_p), (low, high, want.pvalue)
    )
    mean, half = mean_ci95(row.mean(0) - baseline.mean(0))
    np.testing.assert_allclose((mean - half, mean + half), (low, high))
    assert (result.seeds, result.tasks) == (3, 40)
    assert result.mean == pytest.approx((row - baseline).mean(), rel=1e-12)
    assert result.low < result.tasks_low < result.mean < result.tasks_high < result.high


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_equal_scores_have_a_difference_of_0_without_a_warning(seeds):
    row = scores(seeds=seeds)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = difference(row, row.copy())
    nothing = (result.mean, result.low, result.high, result.tasks_low, result.tasks_high)
    assert (*nothing, result.bootstrap_low, result.bootstrap_high) == (0,) * 7
    assert (result.p, result.tasks_p, result.permutation_p) == (1, 1, 1)
    assert result.is_equal
    assert all(math.isfinite(value) for value in astuple(result))


def test_scores_with_the_same_means_over_seeds_and_tasks_are_not_equal():
    result = difference(np.array([[1.0, 0.0], [0.0, 1.0]]), np.full((2, 2), 0.5))
    assert (result.mean, result.low, result.high) == (0, 0, 0)
    assert not result.is_equal


def test_a_constant_difference_has_an_interval_of_width_0_and_a_p_of_0():
    result = difference(np.full((3, 8), 0.75), np.full((3, 8), 0.5))
    assert (result.low, result.mean, result.high, result.p) == (0.25, 0.25, 0.25, 0)
    assert result.permutation_p == 2 / 2**8  # all signs flipped, or none


def test_unpaired_scores_are_refused():
    row, baseline = scores()
    for other in (baseline[:2], baseline[:, :7], baseline[:1]):  # numpy would broadcast the last
        with pytest.raises(ValueError, match="not paired seeds x tasks"):
            difference(row, other)
    with pytest.raises(ValueError, match="not paired seeds x tasks"):
        difference(row[:, :1], baseline[:, :1])


def test_permutation_p_counts_all_sign_flips_of_few_tasks():
    d = np.random.default_rng(3).normal(0.4, 1, 9)
    signs = np.array(list(itertools.product([-1, 1], repeat=9)))
    as_far = np.abs((signs * d).mean(1)) >= abs(d.mean()) * (1 - 1e-12)
    assert permutation_p(d) == as_far.mean()


@pytest.mark.montecarlo
@pytest.mark.parametrize("tasks", [6, 13, 14, 300])
def test_permutation_p_equals_scipy(tasks):
    d = np.random.default_rng(tasks).integers(-4, 5, tasks) / 4  # exact sums
    d[0] += round(math.sqrt(tasks)) - d.sum()  # about two deviations of the sum
    want = scipy_stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(1)
    )
    assert 0.01 < want.pvalue < 0.99
    # Exact for up to 13 tasks, else four standard deviations of the difference of two shares of 9,999.
    error = 1e-12 if tasks <= 13 else 4 * math.sqrt(2 * want.pvalue * (1 - want.pvalue) / 9999)
    assert permutation_p(d) == pytest.approx(want.pvalue, abs=error)


def test_permutation_p_is_1_for_sums_that_tie_at_0():
    assert permutation_p(np.array([0.1, 0.2, -0.3])) == 1  # their sum is 5.6e-17
    assert permutation_p(np.array([0.1, 0.2, -0.3] * 9)) == 1


def test_permutation_p_of_many_tasks_is_close_to_the_t_test():
    correct = np.random.default_rng(4).binomial(50, [[0.601], [0.60]], (2, 5000)) / 50
    p, want = permutation_p(correct[0] - correct[1]), scipy_stats.ttest_rel(*correct).pvalue
    assert 0.01 < want < 0.5
    assert p == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 9999) + 0.0005)


def test_bootstrap_of_two_seeds_and_equal_tasks_has_its_closed_form():
    # Seeds (0, 0), (0, 1) and (1, 1) have means 0, 0.5 and 1, with probabilities 1/4, 1/2 and 1/4.
    assert bootstrap95(np.tile([[0.0], [1.0]], 5)) == (0, 1)
    assert bootstrap95(np.tile([[1.0], [1.0]], 5)) == (1, 1)


@pytest.mark.montecarlo
def test_bootstrap_equals_a_slow_loop_and_with_one_seed_scipy():
    d = crossed(np.random.default_rng(5), 3, 30, 0.1, 0.3, 0.2)
    generator, means = np.random.default_rng(6), []
    for _ in range(10_000):
        seeds, tasks = generator.integers(3, size=3), generator.integers(30, size=30)
        means.append(d[np.ix_(seeds, tasks)].mean())
    spread = np.std(means)
    np.testing.assert_allclose(bootstrap95(d), np.quantile(means, [0.025, 0.975]), atol=0.1 * spread)
    want = scipy_stats.bootstrap((d[0],), np.mean, method="percentile", rng=generator).confidence_interval
    np.testing.assert_allclose(bootstrap95(d[:1]), want, atol=0.1 * d[0].std() / math.sqrt(30))


def test_holm_equals_a_hand_computed_example():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-15)
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []


def test_holm_ignores_missing_p_values():
    assert holm([None, 0.01, math.nan, 0.04]) == [None, 0.02, None, 0.04]


def test_holm_rejects_the_same_hypotheses_as_its_step_down_procedure():
    """Holm 1979: from the smallest p upwards, compare with alpha / (number left), stop at the first above."""
    generator = np.random.default_rng(7)
    for _ in range(200):
        p_values = (generator.random(6) ** 3).tolist()
        for alpha in (0.01, 0.05, 0.3):
            rejected = set()
            for left, place in zip(range(6, 0, -1), np.argsort(p_values), strict=True):
                if p_values[place] > alpha / left:
                    break
                rejected.add(place)
            assert {place for place, p in enumerate(holm(p_values)) if p <= alpha} == rejected


# Standard deviations by seed, by task and of the residual, and whether the interval is exact (up to
# Satterthwaite's degrees of freedom). It is too wide if neither seeds nor tasks have an effect.
REGIMES = {
    "seeds dominate": ((0.05, 0.02, 0.1), True),
    "tasks dominate": ((0.0, 0.2, 0.05), True),
    "both": ((0.012, 0.1, 0.1), True),
    "seeds hardly": ((0.005, 0.0, 0.1), False),
    "neither": ((0.0, 0.0, 0.1), False),
}


@pytest.mark.montecarlo
@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize("regime", REGIMES)
def test_main_interval_covers_the_truth_in_95_percent_of_experiments(regime, seeds):
    deviations, exact = REGIMES[regime]
    generator, tasks = np.random.default_rng(8), 300
    covered = 0
    for _ in range(EXPERIMENTS):
        result = crossed_t(crossed(generator, seeds, tasks, *deviations))
        covered += result.low <= 0 <= result.high
        assert (result.p > 0.05) == (result.low <= 0 <= result.high)
    assert covered / EXPERIMENTS >= 0.95 - ERROR
    if exact:
        assert covered / EXPERIMENTS <= 0.95 + ERROR


@pytest.mark.montecarlo
def test_interval_over_tasks_covers_the_truth_about_these_models():
    generator = np.random.default_rng(9)
    covered = 0
    for _ in range(EXPERIMENTS):
        result = paired_t(crossed(generator, 3, 200, 0.0, 0.1, 0.1).mean(0))
        covered += result.low <= 0 <= result.high
    assert abs(covered / EXPERIMENTS - 0.95) <= ERROR


def accuracies(generator, rows, gain=0.0, seeds=3, tasks=200, queries=25):
    """Accuracies as rows x seeds x tasks; the true accuracy of the first row is higher by `gain`."""
    mean = 0.7 + 0.1 * generator.normal(size=tasks) + 0.015 * generator.normal(size=(rows, seeds, 1))
    mean[0] += gain
    return generator.binomial(queries, mean.clip(0, 1)) / queries


@pytest.mark.montecarlo
def test_false_positives_stay_at_5_percent_in_one_row_and_after_holm_in_eight():
    generator = np.random.default_rng(10)
    one, any_of_8, uncorrected = 0, 0, 0
    for _ in range(EXPERIMENTS):
        baseline, *rows = accuracies(generator, 9)
        p_values = [crossed_t(row - baseline).p for row in rows]
        one += p_values[0] <= 0.05
        any_of_8 += min(holm(p_values)) <= 0.05
        uncorrected += min(p_values) <= 0.05
    assert abs(one / EXPERIMENTS - 0.05) <= ERROR
    assert any_of_8 / EXPERIMENTS <= 0.05 + ERROR
    assert uncorrected / EXPERIMENTS > 0.1  # the reason for Holm's correction


def test_a_planted_difference_is_found():
    generator = np.random.default_rng(11)
    row, baseline = accuracies(generator, 2, gain=0.1, tasks=600)
    result = difference(row, baseline)
    assert result.low < 0.1 < result.high
    assert max(result.p, result.tasks_p, result.permutation_p) < 0.05
    assert min(result.low, result.tasks_low, result.bootstrap_low) > 0
    reverse = difference(baseline, row)
    assert (reverse.mean, reverse.low, reverse.high) == pytest.approx(
        (-result.mean, -result.high, -result.low)
    )


def test_equal_input_gives_identical_results():
    first, second = difference(*scores()), difference(*scores())
    assert first == second and repr(asdict(first)) == repr(asdict(second))
