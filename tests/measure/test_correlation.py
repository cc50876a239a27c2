"""Statistics against independent oracles: scipy, full enumeration, and values worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure import correlation as stats
from sts.measure.correlation import correlate

X = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]
Y = [2.0, 1.0, 4.0, 3.0, 7.0, 5.0]

values = st.floats(-100, 100, allow_subnormal=False).map(lambda value: round(value, 3))
pairs = st.lists(st.tuples(values, values), min_size=3, max_size=12)


def permutation_p(x, y, **settings):
    """The test of one predictor with one seed."""
    test, = stats.permutation_tests(np.array([[x]], float), np.array([y], float), **settings)
    return test


def split(points):
    x, y = np.array(points).T
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    return x, y


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def residuals(values, controls):
    return sm.OLS(values, sm.add_constant(np.asarray(controls))).fit().resid


def partial(x, y, controls):
    """The partial correlation of two vectors, given a list of controls."""
    return float(stats.correlation_rows(x, y, np.array(controls).T))


# --- correlations and lines ---

def test_a_correlation_worked_out_by_hand():
    # x - 2 = (-1, 0, 1), y - 2 = (-1, 1, 0): products sum to 1, both squares sum to 2.
    assert stats.pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert stats.spearman([1, 2, 3], [10, 3000, 20]) == pytest.approx(0.5)
    assert correlate([1, 2, 3], [1, 3, 2], "abc", resamples=20)["r_squared"] == pytest.approx(0.25)


@given(pairs)
@settings(deadline=None)
def test_correlations_and_line_agree_with_scipy(points):
    x, y = split(points)
    line, found = scipy_stats.linregress(x, y), correlate(x, y, range(len(x)), permutations=9, resamples=9)["line"]
    assert stats.pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic, abs=1e-9)
    assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-9)
    assert found["slope"] == pytest.approx(line.slope, rel=1e-6, abs=1e-9)
    assert found["intercept"] == pytest.approx(line.intercept, rel=1e-6, abs=1e-6)


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


def test_r_squared_is_the_share_of_variance_the_line_explains():
    found = correlate(X, Y, "abcdef")
    residuals = np.array(Y) - (found["line"]["slope"] * np.array(X) + found["line"]["intercept"])
    assert found["r_squared"] == pytest.approx(1 - residuals.var() / np.var(Y))


# --- leave one out ---

def test_leaving_one_point_out_is_the_correlation_of_the_rest():
    expected = {name: scipy_stats.pearsonr(np.delete(X, index), np.delete(Y, index)).statistic
                for index, name in enumerate("abcdef")}
    result = correlate(X, Y, "abcdef")["leave_one_out"]
    assert (result["low"], result["high"]) == pytest.approx((min(expected.values()), max(expected.values())))
    assert expected[result["low_without"]] == min(expected.values())
    assert expected[result["high_without"]] == max(expected.values())


def test_a_correlation_that_hangs_on_one_point_is_undefined_without_it():
    result = correlate([0, 0, 0, 1], [0, 1, 2, 3], "abcd")["leave_one_out"]
    assert math.isfinite(result["low"]) and "d" not in (result["low_without"], result["high_without"])


# --- permutation test ---

def test_exact_p_agrees_with_scipys_enumeration():
    # permutation_type="pairings" enumerates the orders of the data given; all 6! = 720 when resampling is unlimited.
    oracle = scipy_stats.permutation_test((Y,), lambda y: stats.pearson(X, y), permutation_type="pairings",
                                          n_resamples=np.inf, alternative="two-sided")
    ours = permutation_p(X, Y)
    assert (ours.exact, ours.resamples) == (True, 720)
    # scipy doubles the smaller tail; ours counts |statistic|. Both are checked through the distribution itself.
    distribution = np.abs(oracle.null_distribution)
    assert ours.p == pytest.approx((distribution >= abs(oracle.statistic) - 1e-12).mean())


def test_exact_p_agrees_with_a_naive_loop():
    observed = abs(scipy_stats.pearsonr(X, Y).statistic)
    naive = np.mean([abs(scipy_stats.pearsonr(X, order).statistic) >= observed - 1e-12
                     for order in itertools.permutations(Y)])
    assert permutation_p(X, Y).p == pytest.approx(naive)


def test_the_smallest_exact_p_is_two_orders_out_of_all():
    # A straight line: only the order itself and its reverse reach |r| = 1.
    assert permutation_p(range(5), range(5)).p == pytest.approx(2 / 120)
    assert permutation_p(range(8), range(8)).resamples == 40_320


def test_random_permutations_come_close_to_the_exact_p_and_never_give_zero(monkeypatch):
    exact = permutation_p(X, Y).p
    monkeypatch.setattr(stats, "EXACT_UP_TO", 0)
    sampled = permutation_p(X, Y, resamples=20_000, seed=3)
    assert not sampled.exact and sampled.resamples == 20_000
    assert sampled.p == pytest.approx(exact, abs=0.012)
    assert permutation_p(range(12), range(12), resamples=99).p == pytest.approx(1 / 100)


def test_the_same_seed_gives_the_same_numbers():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 14))
    for function in (permutation_p, stats.bootstrap_interval):
        assert function(x, y, resamples=500, seed=1) == function(x, y, resamples=500, seed=1)
        assert function(x, y, resamples=500, seed=1) != function(x, y, resamples=500, seed=2)


# --- partial correlation ------------------------------------------------------------------------------------------

def test_partial_correlation_is_that_of_regression_residuals(generator):
    controls = generator.normal(size=(14, 2)) * [1, 1e4] + [0, 1e6]
    x, y = (generator.normal(size=14) + controls @ [1, 1e-4] for _ in range(2))
    expected = scipy_stats.pearsonr(residuals(x, controls), residuals(y, controls))[0]
    assert partial(x, y, controls.T) == pytest.approx(expected)


def test_partial_correlation_with_one_control_follows_the_formula(generator):
    x, y, z = generator.normal(size=(3, 10))
    xy, xz, yz = (scipy_stats.pearsonr(*pair)[0] for pair in ((x, y), (x, z), (y, z)))
    assert partial(x, y, [z]) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))


def test_without_controls_rows_are_pearsons_own(generator):
    x, y = generator.normal(size=(2, 3, 8))
    expected = [scipy_stats.pearsonr(*pair)[0] for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(stats.correlation_rows(x, y), expected)
    np.testing.assert_allclose(stats.correlation_rows(x, y[:1]), [scipy_stats.pearsonr(one, y[0])[0] for one in x])
    assert np.isnan(stats.correlation_rows(np.ones(8), y[0]))


def test_what_controls_explain_completely_has_no_partial_correlation(generator):
    z, y = generator.normal(size=(2, 9))
    assert np.isnan(stats.correlation_rows(3 * z + 7, y, z[:, None]))


# --- permutations of several predictors and seeds ---------------------------------------------------------------------

def test_one_seed_is_the_ordinary_permutation_test(generator):
    x, y = generator.normal(size=(3, 7)), generator.normal(size=7)
    found = stats.permutation_tests(x[:, None], y[None])
    for one, test in zip(x, found, strict=True):
        other = permutation_p(one, y)
        assert test.exact and test.resamples == 5040 and test.p == pytest.approx(other.p)
    many, = stats.permutation_tests(np.r_[x[0], x[1]][None, None], np.r_[y, -y][None], resamples=20_000)
    assert many.p == pytest.approx(permutation_p(np.r_[x[0], x[1]], np.r_[y, -y], resamples=50_000).p, abs=0.02)
    assert not many.exact


def test_seeds_are_shuffled_together(generator):
    x, y = generator.normal(size=(2, 5)), generator.normal(size=(2, 5))
    x[0] += y[0]

    def mean(order):
        return np.mean([scipy_stats.pearsonr(x[seed], y[seed][list(order)])[0] for seed in range(2)])

    values = np.array([mean(order) for order in itertools.permutations(range(5))])
    test, = stats.permutation_tests(x[None], y)
    assert test.p == pytest.approx(np.mean(np.abs(values) >= abs(values[0]) - 1e-12))


def test_with_controls_residuals_are_shuffled(generator):
    z, x, y = generator.normal(size=(3, 6))
    left = residuals(y, z)
    values = np.array([abs(partial(x, left[list(order)], [z]))
                       for order in itertools.permutations(range(6))])
    test, = stats.permutation_tests(x[None, None], y[None], z[None, :, None])
    assert test.p == pytest.approx(np.mean(values >= values[0] - 1e-12)) and not test.exact


def test_a_constant_predictor_has_no_p_and_spoils_no_other(generator):
    x, y = generator.normal(size=(2, 6))
    first, second = stats.permutation_tests(np.stack([np.ones(6), x])[:, None], y[None])
    assert math.isnan(first.p) and second.p == pytest.approx(permutation_p(x, y).p)


# --- bootstrap ---

def test_bootstrap_intervals_cover_the_true_correlation():
    generator, true, covered = np.random.default_rng(7), 0.6, 0
    for seed in range(100):
        x = generator.standard_normal(30)
        y = true * x + math.sqrt(1 - true ** 2) * generator.standard_normal(30)
        interval = stats.bootstrap_interval(x, y, resamples=400, seed=seed)
        covered += interval["low"] <= true <= interval["high"]
    assert 86 <= covered <= 99


def test_bootstrap_agrees_with_scipys_percentile_interval():
    generator = np.random.default_rng(1)
    x = generator.standard_normal(40)
    y = x + generator.standard_normal(40)
    oracle = scipy_stats.bootstrap((x, y), lambda x, y: scipy_stats.pearsonr(x, y, axis=-1).statistic, paired=True,
                                   vectorized=False, n_resamples=1500, method="percentile", rng=0)
    ours = stats.bootstrap_interval(x, y, resamples=4000)
    assert ours["low"] == pytest.approx(oracle.confidence_interval.low, abs=0.03)
    assert ours["high"] == pytest.approx(oracle.confidence_interval.high, abs=0.03)


def test_degenerate_resamples_are_drawn_again():
    interval = stats.bootstrap_interval(np.array([0, 0, 0, 1]), np.arange(4), resamples=200)
    # The one x that differs is missed by (3/4)^4 of the resamples, about a third.
    assert interval["resamples"] == 200 and -1 <= interval["low"] <= interval["high"] <= 1


# --- bundle, power ---

def test_the_bundle_says_the_same_as_its_parts_and_is_plain_json():
    result = correlate(X, Y, "abcdef", resamples=200)
    assert result["pearson"] == stats.pearson(X, Y) and result["p"] == permutation_p(X, Y).p
    assert result["spearman"] == stats.spearman(X, Y)
    plain = json.loads(json.dumps(result, allow_nan=False))
    interval = stats.bootstrap_interval(np.array(X), np.array(Y), resamples=200)
    assert plain["pearson_interval"]["low"] == interval["low"] and plain["exact"] is True


def test_three_points_are_correlated_without_leave_one_out():
    result = correlate([1, 2, 3], [1, 3, 2], "abc", resamples=50)
    assert result["leave_one_out"] is None


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


# --- errors ---

@pytest.mark.parametrize(("x", "y", "message"), [
    ([1, 2, 3], [1, 2], "x has shape .3,. and y .2,."),
    ([1, 2], [1, 2], "at least 3"),
    ([1, math.nan, 3], [1, 2, 3], "x has values that are NaN or infinite"),
    ([1, 2, 3], [1, 2, math.inf], "y has values that are NaN or infinite"),
    ([5, 5, 5], [1, 2, 3], "x is constant"),
    ([1, 2, 3], [0.1, 0.1, 0.1], "y is constant"),
    ([[1, 2, 3]], [1, 2, 3], "x has shape"),
])
@pytest.mark.parametrize("function", [stats.pearson, stats.spearman, lambda x, y: correlate(x, y, "abc")])
def test_bad_points_are_named(function, x, y, message):
    with pytest.raises(StsError, match=message):
        function(x, y)


def test_too_few_points_to_detect_anything_are_refused():
    with pytest.raises(StsError, match="at least 4"):
        stats.smallest_detectable_correlation(3)
