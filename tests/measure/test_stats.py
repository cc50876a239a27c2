"""Statistics against independent oracles: scipy, full enumeration, and values worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure import correlation as stats
from sts.measure import items as stats_items

X = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
Y = [2.0, 1.0, 4.0, 3.0, 7.0, 5.0]

values = st.floats(-100, 100, allow_subnormal=False).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(values, values), min_size=3, max_size=12)


def split(points):
    x, y = np.array(points).T
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    return x, y


# --- correlations and lines ---

def test_a_correlation_worked_out_by_hand():
    # x - 2 = (-1, 0, 1), y - 2 = (-1, 1, 0): products sum to 1, both squares sum to 2.
    assert stats.pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert stats.spearman([1, 2, 3], [10, 3000, 20]) == pytest.approx(0.5)
    assert stats.r_squared([1, 2, 3], [1, 3, 2]) == pytest.approx(0.25)


@given(pairs)
@settings(deadline=None)
def test_correlations_and_line_agree_with_scipy(points):
    x, y = split(points)
    line = scipy_stats.linregress(x, y)
    assert stats.pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic, abs=1e-9)
    assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-9)
    assert stats.r_squared(x, y) == pytest.approx(line.rvalue ** 2, abs=1e-9)
    assert stats.fit_line(x, y).slope == pytest.approx(line.slope, rel=1e-6, abs=1e-9)
    assert stats.fit_line(x, y).intercept == pytest.approx(line.intercept, rel=1e-6, abs=1e-6)


@given(pairs, st.floats(0.01, 100), st.floats(-100, 100))
@settings(deadline=None)
def test_pearson_is_bounded_symmetric_and_blind_to_units(points, scale, offset):
    x, y = split(points)
    r = stats.pearson(x, y)
    assert -1 <= r <= 1
    assert stats.pearson(y, x) == pytest.approx(r, abs=1e-9)
    assert stats.pearson(scale * x + offset, y) == pytest.approx(r, abs=1e-6)
    assert stats.pearson(-scale * x + offset, y) == pytest.approx(-r, abs=1e-6)


@given(pairs)
@settings(deadline=None)
def test_spearman_sees_only_the_order(points):
    x, y = split(points)
    assert stats.spearman(x ** 3, y) == pytest.approx(stats.spearman(x, y), abs=1e-9)


def test_extreme_magnitudes_neither_overflow_nor_vanish():
    assert stats.pearson([1e200, 2e200, 3e200], [1e-200, 3e-200, 2e-200]) == pytest.approx(0.5)
    assert stats.fit_line([1e200, 2e200, 3e200], [1, 2, 3]).slope == pytest.approx(1e-200)


def test_r_squared_is_the_share_of_variance_the_line_explains():
    line = stats.fit_line(X, Y)
    residuals = np.array(Y) - (line.slope * np.array(X) + line.intercept)
    assert stats.r_squared(X, Y) == pytest.approx(1 - residuals.var() / np.var(Y))


def test_a_constant_y_has_a_flat_line():
    assert stats.fit_line([1, 2, 3], [4, 4, 4]) == stats.Line(0.0, 4.0)


# --- leave one out ---

def test_leaving_one_point_out_is_the_correlation_of_the_rest():
    result = stats.leave_one_out(X, Y, list("abcdef"))
    for index, name in enumerate("abcdef"):
        rest = [i for i in range(6) if i != index]
        expected = scipy_stats.pearsonr(np.array(X)[rest], np.array(Y)[rest]).statistic
        assert result[name] == pytest.approx(expected)


def test_a_correlation_that_hangs_on_one_point_is_undefined_without_it():
    result = stats.leave_one_out([0, 0, 0, 1], [0, 1, 2, 3], list("abcd"))
    assert math.isnan(result["d"]) and math.isfinite(result["a"])


# --- permutation test ---

@pytest.mark.parametrize("statistic", [stats.pearson, stats.spearman])
def test_exact_p_agrees_with_scipys_enumeration(statistic):
    # permutation_type="pairings" enumerates the orders of the data given; all 6! = 720 when resampling is unlimited.
    oracle = scipy_stats.permutation_test((Y,), lambda y: statistic(X, y), permutation_type="pairings",
                                          n_resamples=np.inf, alternative="two-sided")
    ours = stats.permutation_p(X, Y, statistic)
    assert (ours.exact, ours.resamples) == (True, 720)
    # scipy doubles the smaller tail; ours counts |statistic|. Both are checked through the distribution itself.
    distribution = np.abs(oracle.null_distribution)
    assert ours.p == pytest.approx((distribution >= abs(oracle.statistic) - 1e-12).mean())


def test_exact_p_agrees_with_a_naive_loop_and_with_any_callable():
    observed = abs(scipy_stats.pearsonr(X, Y).statistic)
    naive = np.mean([abs(scipy_stats.pearsonr(X, order).statistic) >= observed - 1e-12
                     for order in itertools.permutations(Y)])
    assert stats.permutation_p(X, Y).p == pytest.approx(naive)
    assert stats.permutation_p(X, Y, lambda x, y: float(np.corrcoef(x, y)[0, 1])).p == pytest.approx(naive)


def test_the_smallest_exact_p_is_two_orders_out_of_all():
    # A straight line: only the order itself and its reverse reach |r| = 1.
    assert stats.permutation_p(range(5), range(5)).p == pytest.approx(2 / 120)
    assert stats.permutation_p(range(8), range(8)).resamples == 40_320


def test_random_permutations_come_close_to_the_exact_p_and_never_give_zero():
    exact = stats.permutation_p(X, Y).p
    sampled = stats.permutation_p(X, Y, exact_up_to=0, resamples=20_000, seed=3)
    assert not sampled.exact and sampled.resamples == 20_000
    assert sampled.p == pytest.approx(exact, abs=0.012)
    assert stats.permutation_p(range(12), range(12), resamples=99).p == pytest.approx(1 / 100)


def test_the_same_seed_gives_the_same_numbers():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 14))
    for function in (stats.permutation_p, stats.bootstrap_interval):
        assert function(x, y, resamples=500, seed=1) == function(x, y, resamples=500, seed=1)
        assert function(x, y, resamples=500, seed=1) != function(x, y, resamples=500, seed=2)


# --- bootstrap ---

def test_bootstrap_intervals_cover_the_true_correlation():
    generator, true, covered = np.random.default_rng(7), 0.6, 0
    for seed in range(100):
        x = generator.standard_normal(30)
        y = true * x + math.sqrt(1 - true ** 2) * generator.standard_normal(30)
        interval = stats.bootstrap_interval(x, y, resamples=400, seed=seed)
        covered += interval.low <= true <= interval.high
    assert 86 <= covered <= 99


def test_bootstrap_agrees_with_scipys_percentile_interval():
    generator = np.random.default_rng(1)
    x = generator.standard_normal(40)
    y = x + generator.standard_normal(40)
    oracle = scipy_stats.bootstrap((x, y), lambda x, y: scipy_stats.pearsonr(x, y, axis=-1).statistic, paired=True,
                                   vectorized=False, n_resamples=1500, method="percentile", rng=0)
    ours = stats.bootstrap_interval(x, y, resamples=4000)
    assert ours.low == pytest.approx(oracle.confidence_interval.low, abs=0.03)
    assert ours.high == pytest.approx(oracle.confidence_interval.high, abs=0.03)


def test_degenerate_resamples_are_drawn_again_and_counted():
    interval = stats.bootstrap_interval([0, 0, 0, 1], [0, 1, 2, 3], resamples=200)
    # The one x that differs is missed by (3/4)^4 of the resamples, about a third.
    assert interval.redrawn > 20 and -1 <= interval.low <= interval.high <= 1


def test_a_statistic_that_never_exists_is_an_error():
    with pytest.raises(StsError, match="undefined on almost every resample"):
        stats.bootstrap_interval(X, Y, lambda x, y: math.nan, resamples=2)


def test_a_higher_level_gives_a_wider_interval():
    narrow, wide = (stats.bootstrap_interval(X, Y, stats.spearman, level=level, resamples=500) for level in (0.5, 0.9))
    assert wide.low < narrow.low < narrow.high < wide.high


# --- paired means ---

def test_paired_mean_and_its_standard_error_by_hand():
    result = stats_items.paired_mean_interval([0.0, 1.0, 0.0, -1.0, 1.0], resamples=4000)
    # Squared deviations from 0.2 sum to 2.8; 2.8 / 4 = 0.7; sqrt(0.7 / 5).
    assert (result.mean, result.n) == (pytest.approx(0.2), 5)
    assert result.standard_error == pytest.approx(math.sqrt(0.14))
    assert result.low < 0.2 < result.high


def test_paired_interval_is_about_the_normal_one_for_many_items():
    differences = np.random.default_rng(0).choice([-1, 0, 1], size=600, p=[0.2, 0.5, 0.3])
    result = stats_items.paired_mean_interval(differences, resamples=4000)
    assert result.low == pytest.approx(result.mean - 1.96 * result.standard_error, abs=0.005)
    assert result.high == pytest.approx(result.mean + 1.96 * result.standard_error, abs=0.005)


def test_one_item_has_a_mean_but_no_interval():
    result = stats_items.paired_mean_interval([2.0])
    assert result.mean == 2.0 and math.isnan(result.standard_error) and result.kind == "none"
    assert math.isnan(result.low) and math.isnan(result.high)
    assert not (result.low > 0 or result.high < 0)  # as every reader asks whether the sign is resolved


@pytest.mark.parametrize("n", [2, 5, 15])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_few_items_get_students_interval(n, level):
    differences = np.random.default_rng(n).exponential(size=n)
    result = stats_items.paired_mean_interval(differences, level=level)
    oracle = scipy_stats.ttest_1samp(differences, 0).confidence_interval(level)
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high))
    assert (result.kind, result.resamples) == ("t", 0)


def test_from_sixteen_items_the_interval_is_scipys_percentile_bootstrap():
    differences = np.random.default_rng(4).exponential(size=16)
    result = stats_items.paired_mean_interval(differences, resamples=20_000)
    oracle = scipy_stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert (result.low, result.high) == pytest.approx(tuple(oracle.confidence_interval), rel=0.02)
    assert (result.kind, result.resamples) == ("bootstrap", 20_000)


@pytest.mark.parametrize(("shape", "most"), [("normal", 0.075), ("exponential", 0.14)])
def test_an_interval_of_five_items_leaves_the_true_mean_out_about_as_often_as_it_says(shape, most):
    generator = np.random.default_rng(0)
    samples = getattr(generator, shape)(size=(2000, 5)) - (shape == "exponential")  # true mean zero
    found = [stats_items.paired_mean_interval(sample, resamples=100) for sample in samples]
    left_out = np.mean([result.low > 0 or result.high < 0 for result in found])
    assert 0.03 < left_out < most
    # What five items' bootstrap would do, so that the rule has a reason to be there.
    picked = generator.integers(0, 5, (400, 5))
    low, high = np.quantile(samples[:, picked].mean(-1), [0.025, 0.975], axis=1)
    assert ((low > 0) | (high < 0)).mean() > 2 * 0.07


def test_equal_differences_leave_no_uncertainty():
    result = stats_items.paired_mean_interval([1.0] * 4, resamples=50)
    assert (result.low, result.high, result.standard_error) == (1.0, 1.0, 0.0)


# --- bundle, power, overlap ---

def test_the_bundle_says_the_same_as_its_parts_and_is_plain_json():
    result = stats.correlate(X, Y, list("abcdef"), resamples=200)
    others = stats.leave_one_out(X, Y, list("abcdef"))
    assert result.pearson == stats.pearson(X, Y) and result.p == stats.permutation_p(X, Y).p
    assert result.leave_one_out.low == min(others.values())
    assert others[result.leave_one_out.high_without] == max(others.values())
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["pearson_interval"]["low"] == result.pearson_interval.low and plain["exact"] is True
    assert plain["line"] == {"slope": result.line.slope, "intercept": result.line.intercept}


def test_three_points_are_correlated_without_leave_one_out():
    result = stats.correlate([1, 2, 3], [1, 3, 2], resamples=50)
    assert result.leave_one_out is None and result.to_dict()["leave_one_out"] is None


def test_the_detectable_correlation_is_found_as_often_as_promised():
    # The textbook sample size for a correlation of 0.5, two-sided 5%, power 80%, is 29.
    assert stats.smallest_detectable_correlation(29) == pytest.approx(0.5, abs=0.01)
    n = 14
    r = stats.smallest_detectable_correlation(n)
    generator = np.random.default_rng(5)
    x = generator.standard_normal((4000, n))
    y = r * x + math.sqrt(1 - r ** 2) * generator.standard_normal((4000, n))
    found = [scipy_stats.pearsonr(a, b).pvalue < 0.05 for a, b in zip(x[:1500], y[:1500], strict=True)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_more_points_detect_smaller_correlations():
    detectable = [stats.smallest_detectable_correlation(n) for n in (4, 8, 14, 50, 1000)]
    assert detectable == sorted(detectable, reverse=True) and 0 < detectable[-1] < detectable[0] < 1


def test_overlap_by_counting():
    # Two pairs out of four: 6 choices of the second; 1 is the same pair, 4 share one, 1 shares none.
    assert stats.overlap_p(4, 2, 2, 2) == pytest.approx(1 / 6)
    assert stats.overlap_p(4, 2, 2, 1) == pytest.approx(5 / 6)
    assert stats.overlap_p(4, 2, 2, 0) == pytest.approx(1.0)
    assert stats.overlap_p(28_672, 100, 100, 57) < 1e-100


# --- errors ---

@pytest.mark.parametrize(("x", "y", "message"), [
    ([1, 2, 3], [1, 2], "x has 3 values and y has 2"),
    ([1, 2], [1, 2], "at least 3"),
    ([1, math.nan, 3], [1, 2, 3], "x has 1 value.* NaN or infinite, the first at position 1"),
    ([1, 2, 3], [1, 2, math.inf], "y has 1 value.* position 2"),
    ([5, 5, 5], [1, 2, 3], "x is constant"),
    ([1, 2, 3], [0.1, 0.1, 0.1], "y is constant"),
    (["a", "b", "c"], [1, 2, 3], "x must be a list of numbers"),
    ([[1, 2, 3]], [1, 2, 3], "x has shape"),
])
@pytest.mark.parametrize("function", [stats.pearson, stats.spearman, stats.r_squared, stats.permutation_p,
                                      stats.bootstrap_interval, stats.correlate])
def test_bad_points_are_named(function, x, y, message):
    with pytest.raises(StsError, match=message):
        function(x, y)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: stats.fit_line([1, 1, 1], [1, 2, 3]), "x is constant"),
    (lambda: stats.leave_one_out([1, 2, 3], [1, 3, 2], list("abc")), "at least 4"),
    (lambda: stats.leave_one_out(X, Y, list("abcde")), "5 different names for 6 points"),
    (lambda: stats.leave_one_out(X, Y, list("abcdee")), "name of its own"),
    (lambda: stats.permutation_p(X, Y, exact_up_to=11), "at most 10"),
    (lambda: stats.permutation_p(X, Y, resamples=0), "at least 1"),
    (lambda: stats.bootstrap_interval(X, Y, level=95), "between 0 and 1"),
    (lambda: stats_items.paired_mean_interval([]), "No differences"),
    (lambda: stats_items.paired_mean_interval([1, math.nan]), "NaN"),
    (lambda: stats.smallest_detectable_correlation(3), "at least 4"),
    (lambda: stats.smallest_detectable_correlation(8, power=0.01), "alpha < power"),
    (lambda: stats.overlap_p(10, 11, 2, 1), "sizes from 0 to 10"),
    (lambda: stats.overlap_p(10, 5, 5, 6), "0 to 5 work"),
    (lambda: stats.overlap_p(10, 8, 8, 5), "6 to 8 work"),
])
def test_impossible_requests_say_what_would_work(call, message):
    with pytest.raises(StsError, match=message):
        call()
