"""Correlations over domains, questions and seeds: against other libraries, written-out loops and known answers."""

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import bootstrap_interval, permutation_p
from sts.measure.resampling import (
    Resamples,
    correlation_rows,
    hierarchical_resamples,
    partial_correlation,
    percentile_interval,
    permutation_p_over_seeds,
    power_of_design,
    reliability,
    simulated_power,
)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def residuals(values, controls):
    return sm.OLS(values, sm.add_constant(np.asarray(controls))).fit().resid


# --- partial correlation ------------------------------------------------------------------------------------------

def test_partial_correlation_is_that_of_regression_residuals(generator):
    controls = generator.normal(size=(14, 2)) * [1, 1e4] + [0, 1e6]
    x, y = (generator.normal(size=14) + controls @ [1, 1e-4] for _ in range(2))
    expected = scipy_stats.pearsonr(residuals(x, controls), residuals(y, controls))[0]
    assert partial_correlation(x, y, controls.T) == pytest.approx(expected)


def test_partial_correlation_with_one_control_follows_the_formula(generator):
    x, y, z = generator.normal(size=(3, 10))
    xy, xz, yz = (scipy_stats.pearsonr(*pair)[0] for pair in ((x, y), (x, z), (y, z)))
    assert partial_correlation(x, y, [z]) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))


def test_without_controls_rows_are_pearsons_own(generator):
    x, y = generator.normal(size=(2, 3, 8))
    expected = [scipy_stats.pearsonr(*pair)[0] for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(correlation_rows(x, y), expected)
    np.testing.assert_allclose(correlation_rows(x, y[:1]), [scipy_stats.pearsonr(one, y[0])[0] for one in x])
    assert np.isnan(correlation_rows(np.ones(8), y[0]))


def test_what_controls_explain_completely_has_no_partial_correlation(generator):
    z, y = generator.normal(size=(2, 9))
    assert np.isnan(correlation_rows(3 * z + 7, y, z[:, None]))
    with pytest.raises(StsError, match="linear function of the controls"):
        partial_correlation(3 * z + 7, y, [z])


@pytest.mark.parametrize(("x", "y", "controls", "said"), [
    ([1, 2, 3, 4], [1, 2, 3], [[1, 2, 3, 5]], "must pair up"),
    ([1, 2, 4], [1, 3, 2], [[1, 2, 3]], "at least 4 points"),
    ([1, 2, 4, float("nan"), 3], [1, 3, 2, 5, 4], [[1, 2, 3, 7, 6]], "NaN")])
def test_impossible_partial_correlations_are_refused(x, y, controls, said):
    with pytest.raises(StsError, match=said):
        partial_correlation(x, y, controls)


# --- permutation --------------------------------------------------------------------------------------------------

def test_one_seed_is_the_ordinary_permutation_test(generator):
    x, y = generator.normal(size=(3, 7)), generator.normal(size=7)
    found = permutation_p_over_seeds(x[:, None], y[None])
    for one, test in zip(x, found, strict=True):
        other = permutation_p(one, y)
        assert test.exact and test.resamples == 5040 and test.p == pytest.approx(other.p)
    many, = permutation_p_over_seeds(np.r_[x[0], x[1]][None, None], np.r_[y, -y][None], resamples=20_000)
    assert many.p == pytest.approx(permutation_p(np.r_[x[0], x[1]], np.r_[y, -y], resamples=50_000).p, abs=0.02)
    assert not many.exact


def test_seeds_are_shuffled_together(generator):
    x, y = generator.normal(size=(2, 5)), generator.normal(size=(2, 5))
    x[0] += y[0]

    def mean(order):
        return np.mean([scipy_stats.pearsonr(x[seed], y[seed][list(order)])[0] for seed in range(2)])

    values = np.array([mean(order) for order in itertools.permutations(range(5))])
    test, = permutation_p_over_seeds(x[None], y)
    assert test.p == pytest.approx(np.mean(np.abs(values) >= abs(values[0]) - 1e-12))


def test_with_controls_residuals_are_shuffled(generator):
    z, x, y = generator.normal(size=(3, 6))
    left = residuals(y, z)
    values = np.array([abs(partial_correlation(x, left[list(order)], [z]))
                       for order in itertools.permutations(range(6))])
    test, = permutation_p_over_seeds(x[None, None], y[None], z[None, :, None])
    assert test.p == pytest.approx(np.mean(values >= values[0] - 1e-12)) and not test.exact


def test_a_constant_predictor_has_no_p_and_spoils_no_other(generator):
    x, y = generator.normal(size=(2, 6))
    first, second = permutation_p_over_seeds(np.stack([np.ones(6), x])[:, None], y[None])
    assert math.isnan(first.p) and second.p == pytest.approx(permutation_p(x, y).p)


# --- hierarchical bootstrap ---------------------------------------------------------------------------------------

def test_without_noise_of_questions_it_is_a_bootstrap_of_domains(generator):
    y = generator.normal(size=14)**2
    x = y + generator.normal(size=14)
    drawn = hierarchical_resamples([np.full((5, 1), value) for value in y], resamples=20_000)
    found, other = percentile_interval(drawn.correlations(x[None])), bootstrap_interval(x, y, resamples=20_000)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.03)


def test_questions_are_drawn_anew_within_each_domain(generator):
    differences = [generator.normal(loc, 1, size=(40, 1)) for loc in (-5, 8, 12)]
    drawn = hierarchical_resamples(differences, resamples=4000, seed=1)
    for domain, own in enumerate(differences):
        changes = drawn.change_BSN[:, 0][drawn.domains_BN == domain]
        assert changes.mean() == pytest.approx(abs(own.mean()), abs=0.02)
        assert changes.std() == pytest.approx(own.std() / math.sqrt(40), rel=0.05)
        # A domain drawn twice gets questions of its own each time.
        twice = drawn.change_BSN[:, 0][(drawn.domains_BN == domain).sum(1) == 2]
        places = (drawn.domains_BN == domain)[(drawn.domains_BN == domain).sum(1) == 2]
        pairs = twice[places].reshape(-1, 2)
        assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.15


def test_seeds_are_drawn_and_share_domains_and_questions(generator):
    one = [generator.normal(size=(6, 1)) for _ in range(5)]
    drawn = hierarchical_resamples([np.repeat(own, 2, axis=1) for own in one], resamples=500)
    np.testing.assert_array_equal(drawn.change_BSN[:, 0], drawn.change_BSN[:, 1])
    assert {tuple(row) for row in drawn.weights_BS} == {(0, 1), (0.5, 0.5), (1, 0)}


def test_correlations_of_resamples_are_means_over_the_seeds_drawn(generator):
    domains = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 4, 2, 1, 0], [1, 1, 1, 1, 1, 2]])
    drawn = Resamples(domains, np.array([[0.5, 0.5], [1, 0], [0.5, 0.5]]), generator.normal(size=(3, 2, 6)))
    x, z = generator.normal(size=(2, 2, 6))
    plain, partial = drawn.correlations(x), drawn.correlations(x, z[..., None])
    for row, seeds in ((0, (0, 1)), (1, (0,))):
        parts = [(x[seed][domains[row]], drawn.change_BSN[row, seed], z[seed][domains[row]]) for seed in seeds]
        assert plain[row] == pytest.approx(np.mean([scipy_stats.pearsonr(a, b)[0] for a, b, _ in parts]))
        assert partial[row] == pytest.approx(np.mean([partial_correlation(a, b, [c]) for a, b, c in parts]))
    assert np.isnan(plain[2]) and np.isnan(partial[2])  # two different domains always lie on a line
    three = Resamples(np.array([[0, 0, 1, 1, 2, 2]]), np.array([[1, 0]]), drawn.change_BSN[:1])
    assert np.isfinite(three.correlations(x)[0])
    assert np.isnan(three.correlations(x, z[..., None])[0])  # three points always lie on a plane


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator, covered = np.random.default_rng(5), 0
    for trial in range(150):
        true = generator.normal(size=30)
        change = 20 + 3 * (0.6 * true + 0.8 * generator.normal(size=30))  # all positive, so |change| is the change
        drawn = hierarchical_resamples([generator.normal(value, 2, size=(50, 1)) for value in change], resamples=300,
                                       seed=trial)
        interval = percentile_interval(drawn.correlations(true[None]))
        covered += interval.low <= 0.6 <= interval.high
    assert 0.85 <= covered / 150 <= 1


@pytest.mark.parametrize("differences", [
    [np.ones((2, 1))] * 2, [np.ones((2, 1)), np.ones((0, 1)), np.ones((2, 1))],
    [np.ones((2, 1)), np.ones((2, 2)), np.ones((2, 1))], [np.full((2, 1), np.nan)] * 3])
def test_differences_that_cannot_be_resampled_are_refused(differences):
    with pytest.raises(StsError, match="Differences"):
        hierarchical_resamples(differences, resamples=10)


def test_intervals_leave_out_what_is_undefined():
    values = np.r_[np.linspace(0, 1, 101), [np.nan] * 9]
    found = percentile_interval(values, level=0.9)
    assert (found.low, found.high, found.resamples, found.redrawn) == (pytest.approx(0.05), pytest.approx(0.95), 101, 9)
    assert percentile_interval(np.full(100, np.nan)) is None


# --- power --------------------------------------------------------------------------------------------------------

def test_simulated_power_agrees_with_a_t_test_and_with_fishers_z(generator):
    x = generator.normal(size=(4000, 14))
    y = 0.6 * x + 0.8 * generator.normal(size=(4000, 14))
    share = np.mean([scipy_stats.pearsonr(*pair)[1] < 0.05 for pair in zip(x, y, strict=True)])
    assert simulated_power(14, 0.6) == pytest.approx(share, abs=0.04)
    assert simulated_power(14, 0.0) == pytest.approx(0.05, abs=0.015)
    found = power_of_design(14)
    assert found.simulated == pytest.approx(0.8, abs=0.05)
    # The critical value of r that tables print for 14 points.
    assert found.needed == pytest.approx(0.532, abs=5e-4)


def test_impossible_designs_are_refused():
    for arguments in ((3, 0.5), (14, 1.5)):
        with pytest.raises(StsError, match="at least 4 points"):
            simulated_power(*arguments)


def test_reliability_bounds_what_a_perfect_forecast_can_reach():
    generator = np.random.default_rng(1)
    true = generator.normal(0, 2, size=5000)
    measured = true + generator.normal(0, 1, size=5000)
    found = reliability(measured, np.ones(5000))
    assert found == pytest.approx(0.8, abs=0.02)
    assert scipy_stats.pearsonr(true, measured)[0] == pytest.approx(math.sqrt(found), abs=0.02)
    assert reliability([1, 1.1, 0.9], [1, 1, 1]) == 0
    with pytest.raises(StsError, match="do not differ"):
        reliability([1, 1, 1], [1, 1, 1])
    with pytest.raises(StsError, match="as many of both"):
        reliability([1, 2], [1, 2])
