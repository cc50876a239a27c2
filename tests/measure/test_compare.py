"""The comparison engine: every row against scipy, brute force over orders, or the resamples taken by hand."""

import itertools

import numpy as np
import pandas
import pytest
from scipy.stats import pearsonr, spearmanr, t
from statsmodels.stats.multitest import multipletests

from sts.measure.compare import Comparison, best_of, null, sweeps_compared
from sts.measure.correlation import correlation_rows, hierarchical_resamples

NUMBERS = {"bootstrap": 400, "permutations": 2000, "seed": 0}


def example(seeds=2, n=6):
    """Controls, predictors that follow the first of them, and differences of 30 questions a domain that do."""
    generator = np.random.default_rng(3)
    controls, x, noise = (generator.normal(size=size) for size in ((2, seeds, n), (3, seeds, n), (n, 30, seeds)))
    differences = {f"domain {place}": 5 + 2 * controls[0, :, place] + own for place, own in enumerate(noise)}
    return controls, x + 2 * controls[0], differences


def changes(differences):
    return np.abs(np.stack([own.mean(0) for own in differences.values()], axis=1))


def row_of(rows, **wanted):
    own, = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return own


# --- many predictors ----------------------------------------------------------------------------------------------

def test_rows_are_means_over_seeds_with_the_hierarchical_interval_and_the_shuffled_p():
    _, (a, b, flat), differences = example()
    flat = np.ones_like(flat)
    compared = Comparison(differences, {"a": a, "b": b, "flat": flat, "probe": np.full_like(a, np.nan)},
                          reasons={"probe": "its own reason"}, **NUMBERS)
    rows = compared.rows(against=["a", "flat"], untested=["probe"])
    change, drawn = changes(differences), hierarchical_resamples(list(differences.values()), resamples=400)
    for name, x in (("a", a), ("b", b)):
        each = [pearsonr(*pair)[0] for pair in zip(x, change, strict=True)]
        assert rows[name]["by_seed"] == pytest.approx(each) and rows[name]["pearson"] == pytest.approx(np.mean(each))
        ranks = [spearmanr(*pair)[0] for pair in zip(x, change, strict=True)]
        assert rows[name]["spearman"] == pytest.approx(np.mean(ranks))
        ends = np.nanquantile(drawn.correlations(x), [0.025, 0.975])
        interval = rows[name]["pearson_interval"]
        assert (interval["low"], interval["high"]) == pytest.approx(tuple(ends))
        shuffled = [np.mean([pearsonr(one, own[list(order)])[0] for one, own in zip(x, change, strict=True)])
                    for order in itertools.permutations(range(6))]
        assert rows[name]["p"] == pytest.approx(np.mean(np.abs(shuffled) >= abs(np.mean(each)) - 1e-12))
        assert rows[name]["exact"] and [rows[name][of] for of in ("permutations", "n", "seeds")] == [720, 6, 2]
    less = rows["b"]["less"]["a"]
    assert less["mean"] == pytest.approx(rows["a"]["pearson"] - rows["b"]["pearson"]) and rows["a"]["less"] == {}
    ends = np.nanquantile(drawn.correlations(a) - drawn.correlations(b), [0.025, 0.975])
    assert (less["interval"]["low"], less["interval"]["high"]) == pytest.approx(tuple(ends))
    assert "constant" in rows["flat"]["undefined"]
    assert rows["probe"] == {"n": 6, "seeds": 2, "undefined": "its own reason"}


def test_an_untested_predictor_has_neither_p_nor_difference():
    _, (a, b, _), differences = example()
    row = Comparison(differences, {"a": a, "b": b}, **NUMBERS).rows(against=["a"], untested=["b"])["b"]
    assert set(row) == {"n", "seeds", "by_seed", "pearson", "pearson_interval", "spearman"}
    brief = Comparison(differences, {"a": a}, **NUMBERS).rows()["a"]
    assert set(brief) == {"n", "seeds", "by_seed", "pearson", "pearson_interval", "p"}


def test_partial_rows_resample_and_permute_with_the_controls():
    (first, second), (x, *_), differences = example()
    controls, change = np.stack([first, second], axis=-1), changes(differences)
    compared = Comparison(differences, {"x": x, "first": first, "second": second}, **NUMBERS)
    row, = compared.partial(["x"], ["first", "second"])

    def partial(values, goal, seed, places=slice(None)):
        return correlation_rows(values[places], goal, controls[seed][places])

    each = [partial(x[seed], change[seed], seed) for seed in (0, 1)]
    assert row["by_seed"] == pytest.approx(each) and row["pearson"] == pytest.approx(np.mean(each))
    resamples, drawn = hierarchical_resamples(list(differences.values()), resamples=400), []
    for domains, weights, own in zip(resamples.domains_BN, resamples.weights_BS, resamples.change_BSN, strict=True):
        if len(set(domains)) >= 5:  # two controls
            drawn.append(sum(weight * partial(x[seed], own[seed], seed, domains)
                             for seed, weight in enumerate(weights) if weight))
    assert (row["pearson_interval"]["low"], row["pearson_interval"]["high"]) == pytest.approx(
        tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-6)
    left = [least_squares_residuals(change[seed], controls[seed]) for seed in (0, 1)]
    shuffled = [np.mean([partial(x[seed], left[seed][list(order)], seed) for seed in (0, 1)])
                for order in itertools.permutations(range(6))]
    assert row["p"] == pytest.approx(np.mean(np.abs(shuffled) >= abs(row["pearson"]) - 1e-12))


def least_squares_residuals(values, controls):
    design = np.column_stack([np.ones(len(values)), controls])
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def test_what_cannot_be_corrected_is_undefined():
    (first, second), (x, *_), differences = example()
    few = dict(list(differences.items())[:4])
    for own, controls in ((few, (first[:, :4], second[:, :4])), (differences, (first, np.full_like(second, np.nan))),
                          (differences, (x, second))):
        names = Comparison(own, {"x": x[:, :len(own)], "first": controls[0], "second": controls[1]}, **NUMBERS)
        row, = names.partial(["x"], ["first", "second"])
        assert row["undefined"] and set(row) == {"n", "seeds", "undefined"}


def test_chance_is_the_central_95_percent_and_the_observed_value_counts_as_one_draw():
    found = null(np.r_[np.linspace(-1, 1, 101), np.nan], 0.9)
    assert (found["draws"], found["low"], found["high"]) == (101, pytest.approx(-0.95), pytest.approx(0.95))
    assert found["mean"] == pytest.approx(0, abs=1e-12) and found["p"] == pytest.approx((1 + 6) / 102)
    assert "undefined" in null(np.full(3, np.nan), 0.5) and null(np.ones(3), None)["undefined"]


# --- sweeps -------------------------------------------------------------------------------------------------------

def synthetic(scores, own="own"):
    """One seed of seven domains: a table of named values of one axis, and a change of three questions a domain."""
    domains, generator = [f"domain {place}" for place in range(7)], np.random.default_rng(0)
    frame = pandas.DataFrame([{"axis": axis, "value": value, "own": value == own, "domain": domain, "sts_act": x,
                               "sts_icl": x} for (axis, value), own_N in scores.items()
                              for domain, x in zip(domains, own_N, strict=True)])
    differences = {domain: 1.0 + place + 0.1 * generator.normal(size=(3, 1)) for place, domain in enumerate(domains)}
    return frame, differences


def test_the_runs_own_value_in_several_sweeps_is_one_try():
    good, poor = np.arange(7.0), np.random.default_rng(1).normal(size=7)
    frame, differences = synthetic({("bands", "own"): good, ("top_n", "own"): good, ("top_n", "9"): poor})
    best = row_of(sweeps_compared("bits", [frame], differences, **NUMBERS)["best"], score="sts_act")
    assert best["value"] == "own" and best["scores"] == 2


def test_claims_compare_the_last_value_with_the_first_and_holm_corrects_all_differences():
    generator = np.random.default_rng(2)
    frame, differences = synthetic({(axis, value): generator.normal(size=7) for axis in ("bands", "top_n")
                                    for value in ("own", "b", "c")})
    found = sweeps_compared("bits", [frame], differences, **NUMBERS)
    r = {(row["axis"], row["value"]): row["pearson"] for row in found["values"] if row["score"] == "sts_icl"}
    claim = row_of(found["claims"], score="sts_icl")
    assert (claim["axis"], claim["first"], claim["last"]) == ("bands", "own", "c")
    assert claim["mean"] == pytest.approx(r["bands", "c"] - r["bands", "own"])
    less = [row["less"] for row in found["values"] if "less" in row]
    assert len(less) == 2 * 4 and [one["p_holm"] for one in less] == pytest.approx(
        multipletests([one["p"] for one in less], method="holm")[1])
    same = sweeps_compared("bits", [frame.assign(sts_act=1.0)], differences, **NUMBERS)["values"]
    assert all("constant" in row["undefined"] for row in same if row["score"] == "sts_act")


# --- the best of many ---------------------------------------------------------------------------------------------

def test_the_best_is_compared_with_the_best_of_every_order():
    generator = np.random.default_rng(1)
    change, scores = generator.normal(size=(2, 9)), generator.normal(size=(5, 2, 9))
    best = best_of(scores, change, orders=4000)
    r = [np.mean([pearsonr(*pair)[0] for pair in zip(own, change, strict=True)]) for own in scores]
    assert (best["index"], best["scores"]) == (int(np.argmax(r)), 5) and best["pearson"] == pytest.approx(max(r))
    largest = []
    for order in (generator.permutation(9) for _ in range(2000)):
        largest.append(max(np.mean([pearsonr(x, y[order])[0] for x, y in zip(own, change, strict=True)])
                           for own in scores))
    assert best["chance_mean"] == pytest.approx(np.mean(largest), abs=0.02)
    assert best["chance_high"] == pytest.approx(np.quantile(largest, 0.95), abs=0.04)
    assert best["p"] == pytest.approx(np.mean(np.array(largest) >= max(r)), abs=0.03)


def test_the_best_of_independent_scores_is_far_above_a_single_one():
    generator = np.random.default_rng(2)
    best = best_of(generator.normal(size=(40, 1, 14)), generator.normal(size=(1, 14)))
    # One-sided 5% point of r for 14 normal points, from Student's t; the 95% point of the best of forty likewise.
    def point(level):
        quantile = t.ppf(level, 12)
        return quantile / np.sqrt(12 + quantile**2)

    assert best["single_high"] == pytest.approx(point(0.95), abs=0.03)
    assert best["chance_high"] == pytest.approx(point(0.95**(1 / 40)), abs=0.05)


def test_scores_that_are_alike_are_one_try():
    generator = np.random.default_rng(3)
    one, change = generator.normal(size=(1, 14)), generator.normal(size=(1, 14))
    alike = best_of(np.stack([one, 2 * one, one + 9]), change)
    assert alike["chance_high"] == pytest.approx(best_of(one[None], change)["chance_high"])
