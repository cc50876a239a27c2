"""Labels of latents against loops over documents, and lists, intervals and agreement against what is known of them."""

import math

import numpy as np
import pandas
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.multitest import multipletests

from sts.measure import meaning

KINDS = ["mathematics", "code", "web"]


def made(documents=12, latents=40, seed=0):
    """Sums of documents of three kinds: latent 0 fires on mathematics alone, 1 mostly, 2 on one document, 3 never."""
    generator = np.random.default_rng(seed)
    kind_D = np.repeat([0, 1, 2], documents)
    tokens_D = generator.integers(20, 60, len(kind_D)).astype(float)
    sum_DL = generator.gamma(1.0, size=(len(kind_D), latents)) * tokens_D[:, None]
    sum_DL[kind_D != 0, 0] = 0
    sum_DL[kind_D == 0, 1] *= 9
    sum_DL[1:, 2] = 0
    sum_DL[:, 3] = 0
    return {"kind_D": kind_D, "tokens_D": tokens_D, "sum_DL": sum_DL, "fired_DL": np.ceil(sum_DL / 10).clip(0, 20)}


def largest_shares(sums, kind_D):
    """Per latent its share in every kind, one token and one kind after the other."""
    means = [[sum(sums["sum_DL"][d, latent] for d in range(len(kind_D)) if kind_D[d] == kind)
              / sum(sums["tokens_D"][d] for d in range(len(kind_D)) if kind_D[d] == kind) for kind in range(3)]
             for latent in range(sums["sum_DL"].shape[1])]
    return np.array([[own / sum(row) if sum(row) else 0 for own in row] for row in means])


def test_labels_are_what_loops_over_documents_give():
    sums, permutations = made(), 400
    found = meaning.label_latents(sums, KINDS, permutations=permutations, seed=3)
    share_LK = largest_shares(sums, sums["kind_D"])
    np.testing.assert_allclose(found["share"], share_LK.max(1))
    generator, reached = np.random.default_rng(9), np.zeros(40)
    for _ in range(permutations):
        reached += largest_shares(sums, generator.permutation(sums["kind_D"])).max(1) >= share_LK.max(1) - 1e-12
    p = (reached + 1) / (permutations + 1)
    fires = found["latent"] != 3
    np.testing.assert_allclose(found["p"][fires], p[fires], atol=4 * 0.5 / math.sqrt(permutations))  # other shuffles
    np.testing.assert_allclose(found["p_adjusted"][fires], multipletests(found["p"][fires], method="fdr_bh")[1])
    for row in found.itertuples():
        clear = row.share >= 0.5 and row.p_adjusted < 0.05
        assert row.label == ("silent" if row.latent == 3 else row.kind if clear else "several")
        own = sums["kind_D"] == KINDS.index(row.kind)
        mean = sums["sum_DL"][own, row.latent].sum() / sums["tokens_D"][own].sum()
        assert found.loc[row.latent, f"in {row.kind}"] == pytest.approx(mean)
    assert found["label"][:4].tolist() == ["mathematics", "mathematics", "several", "silent"]
    assert found["p"][2] == 1  # wherever its one document stands, that kind has all of it
    assert np.isnan(found["p"][3]) and found["rate"].to_numpy() == pytest.approx(
        sums["fired_DL"].sum(0) / sums["tokens_D"].sum())


def test_a_kind_with_more_text_is_not_favoured():
    sums = made()
    sums["tokens_D"][sums["kind_D"] == 2] *= 10
    sums["sum_DL"][sums["kind_D"] == 2] *= 10
    same = meaning.label_latents(made(), KINDS, permutations=200, seed=0)
    np.testing.assert_allclose(meaning.label_latents(sums, KINDS, permutations=200, seed=0)["share"], same["share"])


def test_latents_that_do_not_care_are_seldom_labelled():
    sums = made(latents=400, seed=5)
    sums["sum_DL"][:, :4] = sums["sum_DL"][:, 4:8]
    found = meaning.label_latents(sums, KINDS, permutations=2000, seed=0)
    assert (found["label"] != "several").sum() == 0
    assert scipy_stats.kstest(found["p"], "uniform").pvalue > 0.01


def test_resampled_labels_move_with_the_documents_drawn():
    sums = made()
    labels = meaning.label_latents(sums, KINDS, permutations=1000, seed=0)
    found = meaning.resampled_labels(sums, labels, KINDS, resamples=300, seed=1)
    assert found.shape == (301, 40)
    places = {name: place for place, name in enumerate(KINDS)}
    assert found[0].tolist() == [places.get(label, -1) for label in labels["label"]]
    assert set(found[:, 0]) == {0} and set(found[:, 2]) == {-1} and set(found[:, 3]) == {-1}
    # A latent just above a half is at times below it, and never becomes another kind's.
    edge = made()
    edge["sum_DL"][:, 1] = np.where(edge["kind_D"] == 0, 2.1, 1) * made(seed=8)["sum_DL"][:, 5]
    labels.loc[1, ["p_adjusted"]] = 0.01
    share = (meaning.resampled_labels(edge, labels, KINDS, resamples=1000, seed=1)[1:, 1] == 0).mean()
    by_hand, generator = [], np.random.default_rng(2)
    for _ in range(1000):
        drawn = np.concatenate([generator.choice(np.flatnonzero(edge["kind_D"] == kind), 12) for kind in range(3)])
        mean = [edge["sum_DL"][own, 1].sum() / edge["tokens_D"][own].sum() for own in drawn.reshape(3, 12)]
        by_hand.append(mean[0] >= 0.5 * sum(mean))
    assert share == pytest.approx(np.mean(by_hand), abs=0.06) and 0.02 < share < 0.98


def test_lists_are_compared_with_the_first():
    values = {"own": np.array([0.5, *np.linspace(0.4, 0.6, 101)]),
              "other": np.array([0.3, *np.linspace(0.4, 0.2, 101)])}
    own, other = meaning.compared(values, n=7)
    assert (own["list"], own["n"], own["value"]) == ("own", 7, 0.5) and own["less"]["value"] == 0
    assert other["less"]["value"] == pytest.approx(0.2)
    low, high = np.quantile(values["own"][1:] - values["other"][1:], [0.025, 0.975])
    assert (other["less"]["interval"]["low"], other["less"]["interval"]["high"]) == pytest.approx((low, high))
    unknown, = meaning.compared({"none": np.full(50, np.nan)})
    assert unknown["value"] is None and unknown["interval"] is None


def test_agreement_is_scikit_learns_kappa_with_an_interval_over_latents():
    generator = np.random.default_rng(0)
    rule = generator.choice(KINDS, 80)
    judge = np.where(generator.random(80) < 0.3, generator.choice(KINDS, 80), rule)
    found = meaning.agreement(rule, judge, resamples=500, seed=0)
    assert found["value"] == pytest.approx(cohen_kappa_score(rule, judge)) and found["n"] == 80
    # The formula itself.
    table = pandas.crosstab(rule, judge).to_numpy() / 80
    chance = table.sum(0) @ table.sum(1)
    assert found["value"] == pytest.approx((np.trace(table) - chance) / (1 - chance))
    assert found["interval"]["low"] < found["value"] < found["interval"]["high"]
    assert found["interval"]["high"] - found["interval"]["low"] < 0.4
    assert meaning.agreement(rule, rule, resamples=100, seed=0)["value"] == 1
    alike = meaning.agreement(["code"] * 9, ["code"] * 9, resamples=100, seed=0)
    assert alike["value"] is None and alike["interval"] is None
