"""Which training set moves a domain: each statistic against a naive loop or scipy, and where it must not be fooled."""

import itertools

import numpy as np
import pandas
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from sts.errors import StsError
from sts.measure import training_sets
from sts.measure.correlation import plain

GENERATOR = np.random.default_rng(5)
X, Y = GENERATOR.normal(size=(2, 4, 6)), np.abs(GENERATOR.normal(size=(2, 4, 6)))  # seeds, training sets, domains


def naive_within(x, y):
    return np.mean([[spearmanr(x[seed, :, d], y[seed, :, d])[0] for d in range(x.shape[2])]
                    for seed in range(len(x))], axis=0)


def test_the_correlation_within_a_domain_is_scipys_over_training_sets():
    assert training_sets.products(X, Y).trace(axis1=1, axis2=2) == pytest.approx(naive_within(X, Y))


def test_scales_of_domains_and_of_ranks_do_not_matter():
    scaled = np.exp(X) * np.array([1, 10, 1e-3, 5, 2, 100])
    found = training_sets.specificity(scaled, Y * 7, resamples=500, bootstrap=200)
    other = training_sets.specificity(X * np.array([3, 1, 2, 1, 1, 9]), Y, resamples=500, bootstrap=200)
    assert found["by_domain"] == pytest.approx(other["by_domain"])
    for name in ("within", "p_within", "p_sets"):
        assert found[name] == pytest.approx(other[name])


def test_orders_drawn_in_each_domain_come_close_to_all_of_them():
    x, y = X[:, :3, :3], Y[:, :3, :3]  # 6 ** 3 = 216 combinations
    observed, orders = abs(naive_within(x, y).mean()), list(itertools.permutations(range(3)))
    extreme = 0
    for combination in itertools.product(orders, repeat=3):
        shuffled = np.stack([x[:, order, d] for d, order in enumerate(combination)], axis=2)
        extreme += abs(naive_within(shuffled, y).mean()) >= observed - 1e-12
    found = training_sets.shuffled_within_domains(training_sets.products(x, y))
    assert found == pytest.approx(extreme / 216, abs=0.015)


def test_whole_sets_change_places_in_all_domains_at_once():
    observed = naive_within(X, Y).mean()
    extreme = [naive_within(X[:, list(order)], Y).mean() >= observed - 1e-12
               for order in itertools.permutations(range(4))]
    found = training_sets.shuffled_sets(training_sets.products(X, Y).mean(0))
    assert found.exact and found.resamples == 24 and found.p == pytest.approx(np.mean(extreme))
    opposite = [naive_within(X[:, list(order)], Y).mean() <= observed + 1e-12
                for order in itertools.permutations(range(4))]
    both = training_sets.specificity(X, Y, resamples=200, bootstrap=100)
    assert (both["p_sets"], both["p_opposite"]) == pytest.approx((np.mean(extreme), np.mean(opposite)))


def test_the_interaction_ignores_levels_of_training_sets():
    shifted = X * np.array([1, 5, 0.1, 2])[None, :, None] + np.array([0, 100, -3, 8])[None, :, None]
    assert training_sets.interaction(shifted, Y) == pytest.approx(training_sets.interaction(X, Y))


def test_the_interaction_is_the_correlation_of_what_levels_leave():
    def residuals(values):
        ranks = np.stack([rankdata(row) for row in values])
        return ranks - ranks.mean(0)

    expected = np.mean([pearsonr(residuals(x).ravel(), residuals(y).ravel())[0] for x, y in zip(X, Y, strict=True)])
    assert training_sets.interaction(X, Y) == pytest.approx(expected)
    assert np.isnan(training_sets.interaction(X, np.ones_like(Y)))


# --- what the tests can and cannot be fooled by -------------------------------------------------------------------

def test_a_forecast_of_the_very_cells_is_found_by_all_tests():
    change = np.abs(GENERATOR.normal(size=(1, 4, 14)))
    found = training_sets.specificity(change**3, change, resamples=2000, bootstrap=300)
    assert found["within"] == pytest.approx(1) and found["interaction"] == pytest.approx(1) and found["hits"] == 1
    assert found["p_within"] < 0.001 and found["p_sets"] == pytest.approx(1 / 24) and found["p_opposite"] == 1
    opposite = training_sets.specificity(-change, change, resamples=500)
    assert opposite["p_opposite"] == pytest.approx(1 / 24) and opposite["p_sets"] == 1
    assert found["low"] == pytest.approx(1)


def test_training_sets_that_differ_everywhere_are_no_proof_of_knowing_the_domain():
    # The forecast knows the level of the training sets and nothing else.
    level = np.array([0.0, 10, 20, 30])[None, :, None]
    x, y = level + GENERATOR.normal(size=(1, 4, 14)), level + np.abs(GENERATOR.normal(size=(1, 4, 14)))
    found = training_sets.specificity(x, y, resamples=2000, bootstrap=300)
    assert found["p_within"] < 0.001  # fourteen hits, as it takes them
    assert found["p_sets"] == pytest.approx(1 / 24)  # one coincidence, as it is
    assert abs(found["interaction"]) < 0.4


def test_effects_on_one_kind_of_domain_are_seldom_taken_for_knowledge_of_domains():
    """Score and change know nothing of one another, but each has an effect of the training set on nine domains."""
    generator, science = np.random.default_rng(0), np.arange(14) < 9

    def drawn():
        return 10 * generator.normal(size=(1, 4, 1)) * science + generator.normal(size=(1, 4, 14))

    found = [training_sets.specificity(drawn(), drawn(), resamples=200, bootstrap=100) for _ in range(400)]
    for p in ([one["p_sets"] for one in found], [one["p_opposite"] for one in found]):
        assert np.mean(np.array(p) <= 0.05) <= 0.06  # at most 1 / 24 in the long run
    assert np.mean([one["p_within"] <= 0.05 for one in found]) > 0.1  # as if the domains were independent


def test_domains_that_move_in_any_case_say_nothing_of_training_sets():
    domain = np.arange(14.0)[None, None] * 50
    x, y = domain + GENERATOR.normal(size=(3, 4, 14)), domain + GENERATOR.normal(size=(3, 4, 14))
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > 0.99
    found = training_sets.specificity(x, y, resamples=1000, bootstrap=200)
    assert abs(found["within"]) < 0.4 and found["low"] < 0 < found["high"]


def test_noise_is_seldom_significant():
    found = [training_sets.products(*GENERATOR.normal(size=(2, 1, 3, 5))) for _ in range(200)]
    p = np.array([[training_sets.shuffled_within_domains(own_DTT, resamples=199),
                   training_sets.shuffled_sets(own_DTT.mean(0)).p] for own_DTT in found])
    assert (p[:, 0] <= 0.1).mean() < 0.17 and (p[:, 1] <= 0.1).mean() == 0  # six orders give no p below 1/6


# --- ties and limits ----------------------------------------------------------------------------------------------

def test_domains_without_a_difference_are_left_out():
    y = Y.copy()
    y[1, :, 2] = 0.5  # in one seed no training set moved it more than another
    found = training_sets.specificity(X, y, resamples=200, bootstrap=200)
    found = plain(found)
    assert found["by_domain"][2] is None and found["defined"] == 5
    assert found["within"] == pytest.approx(np.delete(naive_within(X, Y), 2).mean())


def test_hits_share_ties_and_skip_what_does_not_differ():
    x = np.array([[[3.0, 3, 3, 1], [1, 1, 1, 1]]])
    y = np.array([[[5.0, 1, 2, 9], [5, 4, 1, 1]]])
    assert training_sets.hits(x, y) == pytest.approx((0 + 1) / 2)  # domain 0 is tied in y, domain 3 in x
    three = np.array([[[3.0] * 3, [1] * 3, [2] * 3]])
    tied = np.array([[[5.0] * 3, [5] * 3, [1] * 3]])
    assert training_sets.hits(three, tied) == pytest.approx(0.5)


def test_ties_in_the_forecast_are_shared_whatever_the_order_of_the_sets():
    x, y = np.array([[[3.0] * 3, [3] * 3, [2] * 3]]), np.array([[[9.0] * 3, [5] * 3, [1] * 3]])
    orders = [list(order) for order in itertools.permutations(range(3))]
    assert {training_sets.hits(x[:, order], y[:, order]) for order in orders} == {0.5}


def test_without_any_difference_there_is_nothing_to_compare():
    with pytest.raises(StsError, match="nothing to compare"):
        training_sets.specificity(X, np.ones_like(Y))


@pytest.mark.parametrize(("x", "y", "message"), [
    (X[:, :1], Y[:, :1], "1 training set.*at least two"), (X[:, :, :2], Y[:, :, :2], "2 domain.*three domains"),
    (X, Y * np.nan, "NaN")])
def test_what_cannot_be_compared_is_refused(x, y, message):
    with pytest.raises(StsError, match=message):
        training_sets.specificity(x, y)


# --- lists of latents ---------------------------------------------------------------------------------------------

def rows_of(shared_STT, kind="foreseen"):
    return [{"estimated": row, "trained": column, kind: value} for own_TT in shared_STT
            for row, own_T in enumerate(own_TT) for column, value in enumerate(own_T)]


def test_the_lead_of_the_own_list_is_diagonal_less_the_rest():
    shared = np.array([[[60.0, 20, 30], [10, 50, 20], [5, 15, 70]]])
    found = training_sets.list_lead(rows_of(shared), "foreseen")
    assert (found["own"], found["other"]) == pytest.approx((60, 100 / 6))
    assert found["lead"] == pytest.approx(60 - 100 / 6)
    traces = [sum(shared[0][row, column] for column, row in enumerate(order))
              for order in itertools.permutations(range(3))]
    assert traces[0] == max(traces) and found["p"] == pytest.approx(1 / 6)
    assert training_sets.list_lead(rows_of(shared[:, ::-1]), "foreseen")["p"] == pytest.approx(np.mean(
        [trace >= shared[0, ::-1].trace() for trace in traces]))


def test_lists_that_any_training_moves_have_no_lead():
    found = training_sets.list_lead(rows_of(np.full((2, 4, 4), 37)), "foreseen")
    assert found["lead"] == pytest.approx(0) and found["p"] == 1
    assert "one training set" in training_sets.list_lead(rows_of(np.ones((1, 1, 1))), "foreseen")["undefined"]


def test_the_lead_beyond_another_kind_of_list_is_taken_pair_by_pair():
    generator, names = np.random.default_rng(0), ("code", "maths", "law")
    rows = [{"estimated": one, "trained": other, "foreseen": int(generator.integers(50)),
             "by_rate": int(generator.integers(50))} for one in names for other in names]
    less = [row | {"foreseen": row["foreseen"] - row["by_rate"]} for row in rows]
    beyond = training_sets.list_lead(rows, "foreseen", "by_rate")
    assert beyond == training_sets.list_lead(less, "foreseen") != training_sets.list_lead(rows, "foreseen")


# --- tables of cells ----------------------------------------------------------------------------------------------

SETS, DOMAINS = ("code", "maths", "law"), ("d", "a", "c", "b", "e")
CELLS = pandas.DataFrame([
    {"training_set": name, "seed": seed, "domain": domain, "sts_act": GENERATOR.normal(), "shift": GENERATOR.normal()}
    for seed in (0, 1) for name in SETS for domain in DOMAINS])


def test_a_cube_keeps_the_order_of_the_training_sets():
    values = training_sets.cube(CELLS, "shift")
    assert values.shape == (2, 3, 5)
    for (seed, name), own in CELLS.groupby(["seed", "training_set"]):
        assert values[seed, SETS.index(name)].tolist() == own.sort_values("domain")["shift"].tolist()


def test_over_all_cells_domains_are_drawn_whole():
    generator = np.random.default_rng(8)
    change = generator.random((2, 4, 12))
    forecast = change + generator.random((2, 4, 12))
    found = training_sets.specificity(forecast, change, resamples=100, bootstrap=2000)
    assert found["pooled"] == pytest.approx(np.mean([pearsonr(x.ravel(), y.ravel())[0]
                                                     for x, y in zip(forecast, change, strict=True)]))
    drawn = []
    for _ in range(2000):
        picked = generator.integers(0, 12, 12)
        drawn.append(np.mean([pearsonr(x[:, picked].ravel(), y[:, picked].ravel())[0]
                              for x, y in zip(forecast, change, strict=True)]))
    assert list(found["pooled_interval"].values())[:2] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
