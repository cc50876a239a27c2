"""Intervals by resampling, swapped scores and power: against other libraries, written-out loops and known answers."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.stats import pearsonr

from sts.errors import StsError
from sts.measure import correlation
from sts.measure.correlation import (
    Resamples,
    bootstrap_interval,
    cluster_interval,
    correlation_rows,
    hierarchical_resamples,
    percentile_interval,
    power_of_design,
    simulated_power,
    swap_tests,
)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


# --- hierarchical bootstrap ---------------------------------------------------------------------------------------

def test_without_noise_of_questions_it_is_a_bootstrap_of_domains(generator):
    y = generator.normal(size=14)**2
    x = y + generator.normal(size=14)
    drawn = hierarchical_resamples([np.full((5, 1), value) for value in y], resamples=20_000)
    found, other = percentile_interval(drawn.correlations(x[None])), bootstrap_interval(x, y, resamples=20_000)
    assert (found["low"], found["high"]) == pytest.approx((other["low"], other["high"]), abs=0.03)


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
        assert partial[row] == pytest.approx(np.mean([correlation_rows(a, b, c[:, None]) for a, b, c in parts]))
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
        covered += interval["low"] <= 0.6 <= interval["high"]
    assert 0.85 <= covered / 150 <= 1


def test_intervals_leave_out_what_is_undefined():
    values = np.r_[np.linspace(0, 1, 101), [np.nan] * 9]
    found = percentile_interval(values)
    assert found == {"low": pytest.approx(0.025), "high": pytest.approx(0.975), "resamples": 101}
    assert percentile_interval(np.full(100, np.nan)) is None


# --- power --------------------------------------------------------------------------------------------------------

def test_simulated_power_agrees_with_a_t_test_and_with_fishers_z(generator):
    x = generator.normal(size=(4000, 14))
    y = 0.6 * x + 0.8 * generator.normal(size=(4000, 14))
    share = np.mean([scipy_stats.pearsonr(*pair)[1] < 0.05 for pair in zip(x, y, strict=True)])
    assert simulated_power(14, 0.6) == pytest.approx(share, abs=0.04)
    assert simulated_power(14, 0.0) == pytest.approx(0.05, abs=0.015)
    found = power_of_design(14)
    assert found["simulated"] == pytest.approx(0.8, abs=0.05)
    # The critical value of r that tables print for 14 points.
    assert found["needed"] == pytest.approx(0.532, abs=5e-4)
    with pytest.raises(StsError, match="at least 4"):
        power_of_design(3)


# --- swapping -----------------------------------------------------------------------------------------------------

def standard(values):
    return (values - values.mean()) / values.std()


def brute_force(first_SN, second_SN, change_SN):
    """p by really swapping, one subset of domains at a time."""
    first_SN, second_SN = (np.array([standard(row) for row in own]) for own in (first_SN, second_SN))

    def difference(swapped):
        one, two = (np.where(swapped, second_SN, first_SN), np.where(swapped, first_SN, second_SN))
        return np.mean([pearsonr(a, y)[0] - pearsonr(b, y)[0] for a, b, y in zip(one, two, change_SN, strict=True)])

    subsets = [np.array(own, bool) for own in itertools.product((0, 1), repeat=change_SN.shape[1])]
    observed = abs(difference(subsets[0]))
    return np.mean([abs(difference(own)) >= observed - 1e-12 for own in subsets])


@pytest.mark.parametrize("seeds", [1, 2])
def test_swapping_counts_what_brute_force_counts(seeds):
    generator = np.random.default_rng(seeds)
    change = generator.normal(size=(seeds, 7))
    first = 3 * change + generator.normal(size=(4, seeds, 7))
    second = generator.normal(size=(4, seeds, 7)) * 50 + 7
    tests = swap_tests(first, second, change)
    expected = [brute_force(*pair, change) for pair in zip(first, second, strict=True)]
    assert [test.p for test in tests] == pytest.approx(expected)
    assert all(test.exact and test.resamples == 2**7 for test in tests)


def test_swapping_leaves_equal_scores_at_one_and_constant_ones_undefined():
    generator = np.random.default_rng(0)
    one, change = generator.normal(size=(1, 9)), generator.normal(size=(1, 9))
    first, second = np.stack([one, one, np.ones((1, 9))]), np.stack([one, 5 * one - 3, one])
    found = [test.p for test in swap_tests(first, second, change)]
    assert found[:2] == [1, 1] and np.isnan(found[2])


def test_random_swappings_come_close_to_all_of_them(monkeypatch):
    generator = np.random.default_rng(4)
    first, second, change = generator.normal(size=(3, 1, 12))
    exact, = swap_tests(first[None], second[None], change)
    monkeypatch.setattr(correlation, "SWAPS_UP_TO", 5)
    drawn, = swap_tests(first[None], second[None], change, resamples=20_000)
    assert exact.exact and not drawn.exact and drawn.p == pytest.approx(exact.p, abs=0.02)


def test_swapping_rarely_finds_a_difference_where_there_is_none():
    generator = np.random.default_rng(5)
    change = generator.normal(size=(1, 10))
    noise = generator.normal(size=(2, 400, 1, 10))
    tests = swap_tests(change + noise[0], change + noise[1], change)
    assert 0.02 < np.mean([test.p <= 0.05 for test in tests]) < 0.09


def test_whole_clusters_are_drawn():
    generator = np.random.default_rng(3)
    clusters_N = generator.integers(0, 6, 40)
    x_SN = generator.standard_normal((2, 40)) + 0.3 * clusters_N
    y_SN = 0.5 * x_SN + generator.standard_normal((2, 40))
    naive = []
    for _ in range(4000):
        points = np.concatenate([np.flatnonzero(clusters_N == one) for one in generator.integers(0, 6, 6)])
        naive.append(np.mean([pearsonr(x_N[points], y_N[points])[0] for x_N, y_N in zip(x_SN, y_SN, strict=True)]))
    found = cluster_interval(x_SN, y_SN, clusters_N.tolist(), 4000)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.03)
    # Four copies of every point say nothing more than one; drawing points, they would.
    copied = [np.repeat(own, 4, axis=1) for own in (x_SN, y_SN)]
    names = [f"subject {place}" for place in range(40)]
    assert cluster_interval(*copied, np.repeat(names, 4)) == pytest.approx(cluster_interval(x_SN, y_SN, names))
    assert cluster_interval(x_SN[:, :3], np.ones((2, 3)), ["a", "b", "c"]) is None
