"""Ablations: scores with other values against sums written out, and comparisons against brute force."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, t

from sts.errors import StsError
from sts.measure import sweeps
from sts.run.settings import load_run

NAMES = ("art", "law", "math")


def activations(seed, tokens=30, latents=12):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(tokens, latents, generator=generator, dtype=torch.float64) *
            (torch.rand(tokens, latents, generator=generator) > 0.4) for _ in range(2)]


def stats(base, icl):
    return {"tokens": torch.tensor([float(len(base))]), "base_sum_L": base.sum(0),
            "squared_difference_L": ((icl - base)**2).sum(0)}


SHIFT = stats(*activations(0))
DOMAINS = {name: stats(*activations(seed)) for seed, name in enumerate(NAMES, 1)}


def by_place(rows):
    return {(row["axis"], row["value"], row["domain"]): row for row in rows}


def naive(domain_seed, places):
    """STS_act and STS_ICL with the latents at some places of the ranking, token by token."""
    change = ((activations(0)[1] - activations(0)[0])**2).mean(0).tolist()
    ranked = sorted(range(12), key=lambda latent: -change[latent])
    base, icl = activations(domain_seed)
    chosen = [ranked[place] for place in places]
    act = sum(base[token, latent].item() for token in range(30) for latent in chosen) / 30
    return act, sum((icl - base)[token, latent].item()**2 for token in range(30) for latent in chosen) / 30


# --- values -------------------------------------------------------------------------------------------------------

def test_bands_are_consecutive_ranks():
    rows = by_place(sweeps.band_rows(SHIFT, DOMAINS, 4, 3))
    assert [value for _, value, domain in rows if domain == "law"] == ["1-4", "5-8", "9-12"]
    for first in (0, 4, 8):
        row = rows["bands", f"{first + 1}-{first + 4}", "law"]
        assert (row["sts_act"], row["sts_icl"]) == pytest.approx(naive(2, range(first, first + 4)))
        assert row["own"] == (first == 0)


def test_bands_that_do_not_fit_are_left_out_and_one_too_large_is_refused():
    assert {row["value"] for row in sweeps.band_rows(SHIFT, DOMAINS, 5, 4)} == {"1-5", "6-10"}
    with pytest.raises(StsError, match="13 ranks was asked for; the SAE has 12 latents. Set top_n lower"):
        sweeps.band_rows(SHIFT, DOMAINS, 13, 1)


def test_numbers_of_latents_stand_in_order_with_the_own_one_once():
    rows = by_place(sweeps.number_rows(SHIFT, DOMAINS, 5, [12, 2, 5, 1000]))
    assert [value for _, value, domain in rows if domain == "art"] == ["2", "5", "12"]
    assert (rows["top_n", "2", "math"]["sts_act"], rows["top_n", "2", "math"]["sts_icl"]) == pytest.approx(
        naive(3, range(2)))
    assert [row["own"] for row in rows.values() if row["domain"] == "art"] == [False, True, False]


def test_unfolding_gives_the_sums_of_the_latents_before():
    norms = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    base, icl = activations(1)
    found, before = sweeps.unfolded(stats(base * norms, icl * norms), norms), stats(base, icl)
    assert found.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(found[name], before[name])


def test_a_runs_values_are_sorted_around_its_own():
    settings = load_run("smoke", {"demonstrations": 2, "sweep_demonstrations": [3, 1], "sweep_tokens": [],
                                  "sweep_masks": ["whole_prompt"]})
    assert list(sweeps.forecast_values(settings)) == [
        ("demonstrations", "1", {"demonstrations": 1}), ("demonstrations", "2", {}),
        ("demonstrations", "3", {"demonstrations": 3}), ("masks", "as in this run", {}),
        ("masks", "template too", {"question_tokens_only": False})]


def test_every_sae_differs_from_the_middle_one_in_one_thing():
    settings = load_run("smoke", {"sweep_widths": [64, 256], "sweep_layers": [], "sweep_k": [4]})
    own, axes = sweeps.own_sae(settings), sweeps.sae_values(settings)
    assert list(axes) == ["width", "k"] and all(own in specs for specs in axes.values())
    assert [(spec.latents, spec.k) for spec in axes["width"]] == [(64, 8), (128, 8), (256, 8)]
    assert [(spec.latents, spec.k) for spec in axes["k"]] == [(128, 4), (128, 8)]
    assert sweeps.sae_values(load_run("laptop")) == {}


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
    tests = sweeps.swap_tests(first, second, change)
    expected = [brute_force(*pair, change) for pair in zip(first, second, strict=True)]
    assert [test.p for test in tests] == pytest.approx(expected)
    assert all(test.exact and test.resamples == 2**7 for test in tests)


def test_swapping_leaves_equal_scores_at_one_and_constant_ones_undefined():
    generator = np.random.default_rng(0)
    one, change = generator.normal(size=(1, 9)), generator.normal(size=(1, 9))
    first, second = np.stack([one, one, np.ones((1, 9))]), np.stack([one, 5 * one - 3, one])
    found = [test.p for test in sweeps.swap_tests(first, second, change)]
    assert found[:2] == [1, 1] and np.isnan(found[2])


def test_random_swappings_come_close_to_all_of_them():
    generator = np.random.default_rng(4)
    first, second, change = generator.normal(size=(3, 1, 12))
    exact, = sweeps.swap_tests(first[None], second[None], change)
    drawn, = sweeps.swap_tests(first[None], second[None], change, exact_up_to=5, resamples=20_000)
    assert exact.exact and not drawn.exact and drawn.p == pytest.approx(exact.p, abs=0.02)


def test_swapping_rarely_finds_a_difference_where_there_is_none():
    generator = np.random.default_rng(5)
    change = generator.normal(size=(1, 10))
    noise = generator.normal(size=(2, 400, 1, 10))
    tests = sweeps.swap_tests(change + noise[0], change + noise[1], change)
    assert 0.02 < np.mean([test.p <= 0.05 for test in tests]) < 0.09


# --- the best of many ---------------------------------------------------------------------------------------------

def test_the_best_is_compared_with_the_best_of_every_order():
    generator = np.random.default_rng(1)
    change, scores = generator.normal(size=(2, 9)), generator.normal(size=(5, 2, 9))
    best = sweeps.best_of(scores, change, orders=4000)
    r = [np.mean([pearsonr(*pair)[0] for pair in zip(own, change, strict=True)]) for own in scores]
    assert (best.index, best.scores) == (int(np.argmax(r)), 5) and best.pearson == pytest.approx(max(r))
    largest = []
    for order in (generator.permutation(9) for _ in range(2000)):
        largest.append(max(np.mean([pearsonr(x, y[order])[0] for x, y in zip(own, change, strict=True)])
                           for own in scores))
    assert best.chance_mean == pytest.approx(np.mean(largest), abs=0.02)
    assert best.chance_high == pytest.approx(np.quantile(largest, 0.95), abs=0.04)
    assert best.p == pytest.approx(np.mean(np.array(largest) >= max(r)), abs=0.03)


def test_the_best_of_independent_scores_is_far_above_a_single_one():
    generator = np.random.default_rng(2)
    best = sweeps.best_of(generator.normal(size=(40, 1, 14)), generator.normal(size=(1, 14)))
    # One-sided 5% point of r for 14 normal points, from Student's t; the 95% point of the best of forty likewise.
    def point(level):
        quantile = t.ppf(level, 12)
        return quantile / np.sqrt(12 + quantile**2)

    assert best.single_high == pytest.approx(point(0.95), abs=0.03)
    assert best.chance_high == pytest.approx(point(0.95**(1 / 40)), abs=0.05)


def test_scores_that_are_alike_are_one_try():
    generator = np.random.default_rng(3)
    one, change = generator.normal(size=(1, 14)), generator.normal(size=(1, 14))
    alike = sweeps.best_of(np.stack([one, 2 * one, one + 9]), change)
    assert alike.chance_high == pytest.approx(sweeps.best_of(one[None], change).chance_high)
    assert list(sweeps.different({"a": one, "b": one.copy(), "c": 2 * one})) == ["a", "c"]


def test_a_constant_score_has_no_best():
    with pytest.raises(StsError, match="same in every domain"):
        sweeps.best_of(np.ones((1, 1, 9)), np.arange(9.0)[None])
