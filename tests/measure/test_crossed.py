"""The interval over sets and problems, against scipy, an analysis of variance by hand, and its coverage."""

import numpy as np
import pytest
import scipy.stats

from sts.errors import StsError
from sts.measure.crossed import crossed_mean_interval

GENERATOR = np.random.default_rng(0)


def test_one_set_gives_students_interval_over_problems():
    values_P = GENERATOR.normal(0.3, 1, 9)
    found = crossed_mean_interval([values_P])
    expected = scipy.stats.ttest_1samp(values_P, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.n) == (pytest.approx(values_P.mean()), 9)
    wide = crossed_mean_interval([values_P], level=0.99)
    assert wide.low < found.low and wide.high > found.high


def test_where_problems_are_alike_it_is_students_interval_over_sets():
    sets_D = GENERATOR.normal(size=5)
    found = crossed_mean_interval(np.repeat(sets_D[:, None], 7, axis=1))
    expected = scipy.stats.ttest_1samp(sets_D, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_both_parts_add_up():
    table_DP = np.add.outer([0.0, 2, 4], [0.0, 1, 2, 3])
    found = crossed_mean_interval(table_DP)
    # Means of sets have variance 4, over 3; means of problems 5/3, over 4.
    sets, problems = 4 / 3, 5 / 12
    assert found.mean == 3.5 and found.standard_error == pytest.approx((sets + problems) ** 0.5)
    # Student's tables: 4.303 for 2 degrees of freedom, 3.182 for 3.
    reach = (sets * 4.3027**2 + problems * 3.1824**2) ** 0.5
    assert (found.low, found.high) == pytest.approx((3.5 - reach, 3.5 + reach), rel=1e-4)


@pytest.mark.parametrize(("sets", "problems", "own"), [
    ((5, 1.0), (16, 1.0), 0.5), ((2, 1.0), (16, 0.3), 0.3), ((2, 0.1), (16, 1.0), 0.0), ((5, 0.0), (16, 1.0), 0.0),
    ((19, 0.3), (40, 1.0), 1.0), ((5, 0.0), (4, 1.0), 1.0)])
def test_it_covers_the_mean_in_95_of_100_experiments(sets, problems, own):
    generator, hits, narrow = np.random.default_rng(1), 0, 0
    for _ in range(1500):
        table_DP = (generator.normal(0, sets[1], (sets[0], 1)) + generator.normal(0, problems[1], problems[0])
                    + generator.normal(0, own, (sets[0], problems[0])))
        found = crossed_mean_interval(table_DP)
        hits += found.low <= 0 <= found.high
        alone = scipy.stats.ttest_1samp(table_DP.mean(0), 0).confidence_interval(0.95)
        narrow += alone.low <= 0 <= alone.high
    assert hits / 1500 >= 0.94
    if sets[1] == 1.0:  # an interval over problems alone misses how much sets differ
        assert narrow / 1500 < 0.8


def test_skewed_problems_are_covered_nearly_as_often():
    generator = np.random.default_rng(2)
    found = [crossed_mean_interval(generator.normal(0, 0.5, (5, 1)) + generator.exponential(1, 16))
             for _ in range(1500)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) >= 0.91


def test_constant_tables_single_problems_and_gaps():
    same = crossed_mean_interval([[0.5, 0.5], [0.5, 0.5]])
    assert (same.low, same.high) == (0.5, 0.5)
    one = crossed_mean_interval([[1.0], [3.0]])
    assert one.mean == 2 and np.isnan(one.low) and np.isnan(one.high)
    for table in ([[1.0, np.nan]], [[]], [1.0, 2.0]):
        with pytest.raises(StsError, match="finite value for every set and problem"):
            crossed_mean_interval(table)


@pytest.mark.parametrize(("sets", "problems"), [(5, 16), (19, 40)])
def test_one_more_set_of_the_same_kind_rarely_lies_beyond(sets, problems):
    generator, beyond, naive = np.random.default_rng(4), 0, 0
    for _ in range(1500):
        costs_DP = (generator.normal(0, 1, (sets + 1, 1)) + generator.normal(0, 1, problems)
                    + generator.normal(0, 0.3, (sets + 1, problems)))
        beyond += crossed_mean_interval(costs_DP[0] - costs_DP[1:], against_one=True).low > 0
        naive += crossed_mean_interval(costs_DP[0] - costs_DP[1:]).low > 0
    assert beyond / 1500 <= 0.035  # 2.5% nominally
    assert naive / 1500 > 0.1  # as if the one set had no luck of its own
