"""Baselines: each value against its definition worked out another way."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge

from sts.errors import StsError
from sts.measure import baselines
from sts.measure.score import score_domains, shifted_dimensions
from sts.measure.sets import matched_latents


def stats(seed, latents=40, tokens=50):
    """Sums of random non-negative activations, of which about a third is zero."""
    generator = torch.Generator().manual_seed(seed)
    base, icl = (torch.rand(tokens, latents, generator=generator, dtype=torch.float64) *
                 (torch.rand(tokens, latents, generator=generator) > 0.3) for _ in range(2))
    return {"tokens": torch.tensor([float(tokens)]), "base_sum_L": base.sum(0), "base_square_sum_L": (base**2).sum(0),
            "base_fired_L": (base > 0).double().sum(0), "squared_difference_L": ((icl - base)**2).sum(0)}, base, icl


SHIFT, _, _ = stats(0)
DOMAINS = {name: stats(seed)[0] for seed, name in enumerate(("art", "law", "math"), 1)}


# --- scores on other dimensions -----------------------------------------------------------------------------------

def test_all_dimensions_give_total_activation_and_total_change():
    _, base, icl = stats(2)
    act, changed = (known().scored("all", score)["law"] for score in ("sts_act", "sts_icl"))
    assert act == pytest.approx(base.sum(1).mean().item())
    assert changed == pytest.approx(((icl - base)**2).sum(1).mean().item())


def test_fewer_dimensions_are_those_that_the_training_set_moves_most():
    _, base, _ = stats(1)
    most = np.argsort(-SHIFT["squared_difference_L"].numpy())[:5]
    assert known(raw_shift=SHIFT, raw=DOMAINS, raw_count=5).scored("raw", "sts_act")["art"] == pytest.approx(
        base[:, most.copy()].sum(1).mean().item())
    assert baselines.values_of(known(raw_shift=SHIFT, raw=DOMAINS, raw_count=5))["raw_square"]["art"] == pytest.approx(
        (base[:, most.copy()]**2).sum(1).mean().item())


# --- likeness -----------------------------------------------------------------------------------------------------

def test_cosines_compare_mean_activations():
    means = {name: (own["base_sum_L"] / own["tokens"]).numpy() for name, own in DOMAINS.items()}
    goal, middle = (SHIFT["base_sum_L"] / 50).numpy(), np.mean(list(means.values()), axis=0)
    plain, centred = (baselines.cosine(DOMAINS, SHIFT, centred=centred) for centred in (False, True))
    for name, own in means.items():
        assert plain[name] == pytest.approx(own @ goal / np.linalg.norm(own) / np.linalg.norm(goal))
        own, other = own - middle, goal - middle
        assert centred[name] == pytest.approx(own @ other / np.linalg.norm(own) / np.linalg.norm(other))
    assert baselines.cosine({"same": SHIFT}, SHIFT)["same"] == pytest.approx(1)


TEXTS = {"law": ["The court heard the case", "A case of theft"], "math": ["Add two numbers", "How many apples has he?"]}
TRAINING = ["How many apples are two and two apples?", "Add the numbers"]


def test_tfidf_similarity_follows_its_formula():
    def words(text):
        return Counter(re.findall(r"\b\w\w+\b", text.lower()))

    documents = [words(text) for text in (*TEXTS["law"], *TEXTS["math"], *TRAINING)]
    vocabulary = sorted(set().union(*documents))
    idf = {word: math.log((1 + 6) / (1 + sum(word in one for one in documents))) + 1 for word in vocabulary}
    vectors = np.array([[one[word] * idf[word] for word in vocabulary] for one in documents])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    law, math_, training = (vectors[rows].mean(0) for rows in (slice(0, 2), slice(2, 4), slice(4, 6)))
    found = baselines.tfidf_similarity(TEXTS, TRAINING)
    for name, own in (("law", law), ("math", math_)):
        assert found[name] == pytest.approx(own @ training / np.linalg.norm(own) / np.linalg.norm(training))
    assert found["math"] > found["law"]


def test_change_of_the_model_is_measured_on_tokens_and_on_means():
    before, after = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).double(), torch.tensor([[1.0, 1.0], [3.0, 7.0]]).double()
    change = {"law": {
        "base_sum_L": before.sum(0), "tuned_sum_L": after.sum(0), "squared_difference_L": ((after - before)**2).sum(0),
        "latents_squared": torch.tensor([6.0]), "tokens": torch.tensor([2.0])}}
    assert baselines.change_cosine(change)["law"] == pytest.approx(1 - 4 / math.sqrt(4**2 + 8**2))
    assert baselines.per_token(change, "squared_difference_L")["law"] == pytest.approx((1 + 49) / 2)
    assert baselines.per_token(change, "latents_squared")["law"] == pytest.approx(3)


# --- all of them --------------------------------------------------------------------------------------------------

def known(**changes):
    raw = {name: stats(seed, latents=8)[0] for seed, name in enumerate(DOMAINS, 11)}
    change = {name: {"tokens": own["tokens"], "base_sum_L": own["base_sum_L"], "tuned_sum_L": own["base_sum_L"] + 1,
                     "squared_difference_L": own["squared_difference_L"], "latents_squared": torch.tensor([5.0])}
              for name, own in raw.items()}
    frame = pandas.DataFrame({"sts_act": [1.0, 2, 3], "sts_icl": [4.0, 5, 6], "tfidf": [0.1, 0.2, 0.3],
                              "question_tokens": [7.0, 8, 9]}, index=list(DOMAINS))
    return replace(baselines.Known(SHIFT, stats(10, latents=8)[0], stats(5)[0], DOMAINS, raw, change, frame, frame,
                                   pandas.Series({"law": 1.5, "math": 2.5}), 6, 2), **changes)


def test_every_predictor_that_needs_no_answers_has_a_value_in_every_domain():
    run = known()
    found = baselines.values_of(run)
    assert set(found) == set(baselines.PREDICTORS) - {"probe_raw", "probe_sae", "answer_shortness"}
    assert found.index.name == "domain"
    assert np.isfinite(found.drop(columns="base_bits").to_numpy()).all()
    assert found["base_bits"].tolist()[1:] == [1.5, 2.5] and np.isnan(found["base_bits"].iloc[0])  # not evaluated
    assert found["sts_icl"].tolist() == [4, 5, 6] and found["question_tokens"].tolist() == [7, 8, 9]
    assert found["all_icl"].tolist() == run.scored("all", "sts_icl").tolist()
    assert found["actual_act"].tolist() == [
        row["sts_act"] for row in score_domains("paper", run.moved, DOMAINS, 6)]
    size = baselines.per_token(run.change, "squared_difference_L")
    assert found["change_rms"].tolist() == pytest.approx([math.sqrt(one) for one in size])


def test_a_new_predictor_is_one_entry(monkeypatch):
    monkeypatch.setitem(baselines.PREDICTORS, "twice", baselines.Predictor(
        "twice the length", "the domain itself", lambda run: 2 * run.texts["question_tokens"]))
    assert baselines.values_of(known())["twice"].tolist() == [14, 16, 18]


# --- random latents -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["rate", "energy"])
def test_random_sets_imitate_the_chosen_latents_and_hold_none_of_them(kind):
    found = baselines.random_set_scores(kind, SHIFT, DOMAINS, 6, 20, seed=3)
    chosen = shifted_dimensions(SHIFT["squared_difference_L"], 6)
    like_L = SHIFT["base_fired_L" if kind == "rate" else "base_square_sum_L"] / 50
    sets = [matched_latents(like_L, chosen, 300_000 + draw) for draw in range(20)]
    assert not set(torch.cat(sets).tolist()) & set(chosen.tolist())
    expected = [[(own["base_sum_L"][one].sum() / 50).item() for own in DOMAINS.values()] for one in sets]
    np.testing.assert_allclose(found["act_RD"], expected)
    changed = [[(own["squared_difference_L"][one].sum() / 50).item() for own in DOMAINS.values()] for one in sets]
    np.testing.assert_allclose(found["icl_RD"], changed)
    np.testing.assert_allclose(found["matched_R"], [like_L[one].mean() for one in sets])
    assert found["chosen"].item() == pytest.approx(like_L[chosen].mean().item())
    pairs = [len(set(one.tolist()) & set(other.tolist())) / 6 for one, other in itertools.combinations(sets, 2)]
    assert found["shared"].item() == pytest.approx(np.mean(pairs), rel=1e-6) and 0 < np.mean(pairs) < 1


def test_sets_that_imitate_the_few_most_active_latents_are_known_to_share_latents():
    # As in a real SAE: the four chosen latents and five others fire often, the rest hardly ever.
    rare = SHIFT | {"base_fired_L": torch.where(torch.arange(40) < 9, 40.0, 0.0).double(),
                    "squared_difference_L": torch.where(torch.arange(40) < 4, 9.0, 0.0).double()}
    imitated, even = (baselines.random_set_scores(kind, rare, DOMAINS, 4, 20, seed=0)["shared"].item()
                      for kind in ("rate", "uniform"))
    assert even < 0.2 and imitated > 2 * even
    assert baselines.random_set_scores("uniform", SHIFT, DOMAINS, 4, 1, seed=0)["shared"].item() == 1  # a single set


def test_uniform_sets_cover_all_other_latents_and_differ_between_seeds():
    # Latent l is active at l, so that a set's score on one latent names it.
    ladder = SHIFT | {"base_sum_L": torch.arange(40).double() * 50}
    first, second = (baselines.random_set_scores("uniform", SHIFT, {"x": ladder}, 1, 400, seed=seed)["act_RD"]
                     for seed in (0, 1))
    chosen = shifted_dimensions(SHIFT["squared_difference_L"], 1).item()
    assert set(first.flatten().round().int().tolist()) == set(range(40)) - {chosen}
    assert not torch.equal(first, second)


def test_random_sets_that_cannot_be_drawn_are_refused():
    with pytest.raises(StsError, match="Set top_n to at most 20"):
        baselines.random_set_scores("rate", SHIFT, DOMAINS, 21, 5, seed=0)


# --- probes -------------------------------------------------------------------------------------------------------

def nested_by_hand(features, target, alphas):
    """Leave-one-out twice, every model fitted anew."""
    predictions = []
    for left in range(len(target)):
        others = np.delete(np.arange(len(target)), left)
        mean, spread = features[others].mean(0), features[others].std(0)
        scaled = (features - mean) / np.where(spread > 0, spread, 1) / np.sqrt(features.shape[1])
        errors = []
        for alpha in alphas:
            inner = [(Ridge(alpha).fit(scaled[rest := others[others != one]], target[rest]).predict(
                scaled[[one]])[0] - target[one])**2 for one in others]
            errors.append(np.mean(inner))
        best = Ridge(alphas[int(np.argmin(errors))]).fit(scaled[others], target[others])
        predictions.append(best.predict(scaled[[left]])[0])
    return np.array(predictions)


def test_probes_agree_with_a_nested_loop_written_out():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(9, 30)) @ np.diag(generator.uniform(0.1, 5, 30))
    features[:, 7] = 2.0  # a latent that says nothing
    targets = np.column_stack([features[:, 0] + generator.normal(size=9), generator.normal(size=9)])
    alphas = np.array([0.01, 1.0, 100.0])
    found = baselines.held_out_predictions(features, targets, alphas)
    for column in range(2):
        np.testing.assert_allclose(found[:, column], nested_by_hand(features, targets[:, column], alphas), rtol=1e-6)


def test_a_prediction_does_not_see_its_own_target():
    generator = np.random.default_rng(1)
    features, target = generator.normal(size=(8, 20)), generator.normal(size=(8, 1))
    other = target.copy()
    other[3] = 50.0
    first, second = (baselines.held_out_predictions(features, one)[:, 0] for one in (target, other))
    assert first[3] == pytest.approx(second[3]) and not np.allclose(np.delete(first, 3), np.delete(second, 3))


def test_a_probe_finds_a_signal_and_is_biased_downwards_without_one():
    generator = np.random.default_rng(2)
    hidden = generator.normal(size=14)
    features = np.outer(hidden, generator.normal(size=200)) + 0.3 * generator.normal(size=(14, 200))
    target = 2 * hidden + 0.1 * generator.normal(size=14)
    predicted = baselines.held_out_predictions(features, target[:, None])[:, 0]
    assert pearsonr(predicted, target)[0] > 0.95 and baselines.out_of_sample_r_squared(target, predicted) > 0.9
    noise = generator.normal(size=(14, 200))
    found = baselines.held_out_predictions(features, noise)
    assert np.mean([pearsonr(found[:, column], noise[:, column])[0] for column in range(200)]) < -0.2


def test_out_of_sample_r_squared_is_zero_for_the_mean_of_the_others():
    target = np.array([1.0, 4.0, 2.0, 9.0])
    others = np.array([np.delete(target, place).mean() for place in range(4)])
    assert baselines.out_of_sample_r_squared(target, others) == pytest.approx(0)
    assert pearsonr(target, others)[0] == pytest.approx(-1)  # where the correlation is as low as can be
    assert baselines.out_of_sample_r_squared(target, target) == 1
    with pytest.raises(StsError, match="same in every domain"):
        baselines.out_of_sample_r_squared(np.ones(4), others)


def test_probes_without_enough_domains_are_refused():
    with pytest.raises(StsError, match="4 domains given; .* at least 5"):
        baselines.held_out_predictions(np.ones((4, 3)), np.ones((4, 1)))
