"""Means with intervals, measures of items and changes of domains: against scipy, statsmodels and values by hand."""

import math

import numpy as np
import pandas
import pytest
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.items import (
    change_quality,
    crossed_mean_interval,
    item_differences,
    item_measures,
    item_shifts,
    mcnemar_p,
    paired_mean_interval,
)

# --- paired means --------------------------------------------------------------------------------------------------

def test_paired_mean_and_its_standard_error_by_hand():
    result = paired_mean_interval([0.0, 1.0, 0.0, -1.0, 1.0], resamples=4000)
    # Squared deviations from 0.2 sum to 2.8; 2.8 / 4 = 0.7; sqrt(0.7 / 5).
    assert (result.mean, result.n) == (pytest.approx(0.2), 5)
    assert result.standard_error == pytest.approx(math.sqrt(0.14))
    assert result.low < 0.2 < result.high


def test_paired_interval_is_about_the_normal_one_for_many_items():
    differences = np.random.default_rng(0).choice([-1, 0, 1], size=600, p=[0.2, 0.5, 0.3])
    result = paired_mean_interval(differences, resamples=4000)
    assert result.low == pytest.approx(result.mean - 1.96 * result.standard_error, abs=0.005)
    assert result.high == pytest.approx(result.mean + 1.96 * result.standard_error, abs=0.005)


def test_one_item_has_a_mean_but_no_interval():
    result = paired_mean_interval([2.0])
    assert result.mean == 2.0 and math.isnan(result.standard_error) and result.kind == "none"
    assert math.isnan(result.low) and math.isnan(result.high)
    assert not (result.low > 0 or result.high < 0)  # as every reader asks whether the sign is resolved


@pytest.mark.parametrize("n", [2, 5, 15])
def test_few_items_get_students_interval(n):
    differences = np.random.default_rng(n).exponential(size=n)
    result = paired_mean_interval(differences)
    oracle = scipy_stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high))
    assert result.kind == "t"


def test_from_sixteen_items_the_interval_is_scipys_percentile_bootstrap():
    differences = np.random.default_rng(4).exponential(size=16)
    result = paired_mean_interval(differences, resamples=20_000)
    oracle = scipy_stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert (result.low, result.high) == pytest.approx(tuple(oracle.confidence_interval), rel=0.02)
    assert result.kind == "bootstrap"


@pytest.mark.parametrize(("shape", "most"), [("normal", 0.075), ("exponential", 0.14)])
def test_an_interval_of_five_items_leaves_the_true_mean_out_about_as_often_as_it_says(shape, most):
    generator = np.random.default_rng(0)
    samples = getattr(generator, shape)(size=(2000, 5)) - (shape == "exponential")  # true mean zero
    found = [paired_mean_interval(sample, resamples=100) for sample in samples]
    left_out = np.mean([result.low > 0 or result.high < 0 for result in found])
    assert 0.03 < left_out < most
    # What five items' bootstrap would do, so that the rule has a reason to be there.
    picked = generator.integers(0, 5, (400, 5))
    low, high = np.quantile(samples[:, picked].mean(-1), [0.025, 0.975], axis=1)
    assert ((low > 0) | (high < 0)).mean() > 2 * 0.07


def test_equal_differences_leave_no_uncertainty():
    result = paired_mean_interval([1.0] * 4, resamples=50)
    assert (result.low, result.high, result.standard_error) == (1.0, 1.0, 0.0)


# --- means over sets and problems ------------------------------------------------------------------------------------

GENERATOR = np.random.default_rng(0)


def test_one_set_gives_students_interval_over_problems():
    values_P = GENERATOR.normal(0.3, 1, 9)
    found = crossed_mean_interval([values_P])
    expected = scipy_stats.ttest_1samp(values_P, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.n) == (pytest.approx(values_P.mean()), 9)


def test_where_problems_are_alike_it_is_students_interval_over_sets():
    sets_D = GENERATOR.normal(size=5)
    found = crossed_mean_interval(np.repeat(sets_D[:, None], 7, axis=1))
    expected = scipy_stats.ttest_1samp(sets_D, 0).confidence_interval(0.95)
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
        alone = scipy_stats.ttest_1samp(table_DP.mean(0), 0).confidence_interval(0.95)
        narrow += alone.low <= 0 <= alone.high
    assert hits / 1500 >= 0.94
    if sets[1] == 1.0:  # an interval over problems alone misses how much sets differ
        assert narrow / 1500 < 0.8


def test_skewed_problems_are_covered_nearly_as_often():
    generator = np.random.default_rng(2)
    found = [crossed_mean_interval(generator.normal(0, 0.5, (5, 1)) + generator.exponential(1, 16))
             for _ in range(1500)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) >= 0.91


def test_constant_tables_and_single_problems():
    same = crossed_mean_interval([[0.5, 0.5], [0.5, 0.5]])
    assert (same.low, same.high) == (0.5, 0.5)
    one = crossed_mean_interval([[1.0], [3.0]])
    assert one.mean == 2 and np.isnan(one.low) and np.isnan(one.high)


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


# --- from log-likelihoods to measures --------------------------------------------------------------------------------

def frame(values):
    """(example, domain, kind, option, loglikelihood, characters, is_right) rows as evaluate returns them."""
    return pandas.DataFrame(values, columns=["example_id", "domain", "kind", "option", "loglikelihood", "characters",
                                             "is_right"])


def test_measures_by_hand():
    rows = frame([
        ("a", "law", "letter", 0, math.log(0.2), 2, False), ("a", "law", "letter", 1, math.log(0.3), 2, True),
        ("a", "law", "solution", -1, -20 * math.log(2), 10, True),
        ("b", "law", "letter", 0, math.log(0.1), 2, True), ("b", "law", "letter", 1, math.log(0.4), 2, False),
        ("b", "law", "solution", -1, -3 * math.log(2), 6, True)])
    items = item_measures(rows)
    assert items["p_right"].to_dict() == pytest.approx({"a": 60.0, "b": 20.0})
    assert items["accuracy"].to_dict() == {"a": 100.0, "b": 0.0}
    assert items["bits"].to_dict() == pytest.approx({"a": 2.0, "b": 0.5})


def domain_shifts(before, after):
    return item_shifts(item_measures(before), item_measures(after))


def letters(item, right, domain="law"):
    """Two options' letters, of which the right one is the likelier or not."""
    return [(item, domain, "letter", 0, -1.0 if right else -3.0, 1, True),
            (item, domain, "letter", 1, -2.0, 1, False)]


def test_mcnemar_counts_the_items_that_turn():
    before = [row for i in range(20) for row in letters(f"i{i}", i >= 9)]  # nine wrong
    after = [row for i in range(20) for row in letters(f"i{i}", i != 19 and i != 0)]  # eight turn right, one wrong
    shifts = domain_shifts(frame(before), frame(after)).set_index("measure")
    # Nine items turned, eight of them one way: two-sided binomial, 2 * (1 + 9) / 2**9.
    assert shifts.loc["accuracy", "mcnemar_p"] == pytest.approx(2 * (1 + 9) / 512)
    assert shifts.loc["accuracy", "shift"] == pytest.approx(100 * (8 - 1) / 20)
    assert np.isnan(shifts.loc["p_right", "mcnemar_p"])
    same = domain_shifts(frame(before), frame(before)).set_index("measure")
    assert same.loc["accuracy", "mcnemar_p"] == 1.0


def test_mcnemar_agrees_with_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar

    generator = np.random.default_rng(1)
    for _ in range(20):
        before, after = generator.random((2, 30)) < generator.random((2, 1))
        table = [[(before & after).sum(), (before & ~after).sum()], [(~before & after).sum(), (~before & ~after).sum()]]
        assert mcnemar_p(before, after) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_domain_shift_is_the_paired_mean_change_with_its_sign():
    generator = np.random.default_rng(0)
    before, after = [], []
    for index in range(40):
        domain = "law" if index % 2 else "math"
        bits = generator.normal(30, 5)
        change = -4 if domain == "math" else 0
        before.append((f"i{index}", domain, "solution", -1, -bits * math.log(2), 10, True))
        after.append((f"i{index}", domain, "solution", -1,
                      -(bits + change + generator.normal(0, 1)) * math.log(2), 10, True))
    shifts = domain_shifts(frame(before), frame(list(reversed(after)))).set_index("domain")
    assert list(shifts["measure"].unique()) == ["bits"]  # nothing has options, so no accuracy
    assert shifts.loc["math", "shift"] == pytest.approx(-0.4, abs=0.06)
    assert shifts.loc["math", "high"] < 0 < shifts.loc["law", "high"]
    assert shifts.loc["law", "low"] < 0
    assert (shifts["n"] == 20).all()
    assert shifts.loc["math", "shift"] == pytest.approx(shifts.loc["math", "after"] - shifts.loc["math", "before"])


def test_differences_are_kept_by_question_and_seed():
    before = frame([("a", "law", "solution", -1, -10 * math.log(2), 5, True),
                    ("b", "math", "solution", -1, -6 * math.log(2), 3, True)])
    after = [before.assign(loglikelihood=before["loglikelihood"] + extra * math.log(2)) for extra in (5, 10)]
    found = item_differences({seed: (before, own.iloc[::-1]) for seed, own in enumerate(after)})
    assert list(found) == ["bits"]  # nothing has letters
    np.testing.assert_allclose(found["bits"]["law"], [[-1, -2]])
    np.testing.assert_allclose(found["bits"]["math"], [[-5 / 3, -10 / 3]])


# --- reliability -----------------------------------------------------------------------------------------------------

def test_the_reliability_of_changes_is_the_share_of_their_variance_that_is_not_noise():
    # Domains' true changes have variance 1 and lie far from 0; a mean over 40 questions has noise of variance 0.5.
    generator = np.random.default_rng(5)
    true_N = 8 + generator.standard_normal(400)
    differences = {str(place): mean + generator.normal(0, math.sqrt(20), (40, 2)) for place, mean in enumerate(true_N)}
    found = change_quality(differences, splits=50)
    assert found["reliability"] == pytest.approx(1 / 1.5, abs=0.05)
    assert found["change"] == pytest.approx(8, abs=0.2)
    assert found["beyond"] == 1
    nothing = change_quality({name: own - own.mean(0) + generator.normal(0, math.sqrt(0.5), 2)
                                    for name, own in differences.items()}, splits=50)
    assert nothing["noise"] == pytest.approx(nothing["change"], rel=0.1)
    assert nothing["beyond"] == pytest.approx(0.05, abs=0.03)
    with pytest.raises(StsError, match="'law' has one question, too few"):
        change_quality({"law": np.zeros((1, 1))})
