"""Rivals' formulas against loops, numbers worked out by hand, scipy and simulation."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import linregress, multivariate_normal
from statsmodels.stats.proportion import proportion_confint

from sts.errors import StsError
from sts.measure import rivals


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# --- projection difference ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("chosen", [None, [4, 0, 2]])
def test_projection_difference_is_a_loop_over_examples_and_domains(chosen):
    training, own, answers = random(5, 6), random(5, 6, seed=1), random(3, 6, seed=2)
    found = rivals.projection_difference(training, own, answers, *([] if chosen is None else [torch.tensor(chosen)]))
    kept = range(6) if chosen is None else chosen
    for example in range(5):
        for domain in range(3):
            toward = [answers[domain, j].item() - np.mean([answers[other, j].item() for other in range(3)])
                      for j in kept]
            length = sum(part**2 for part in toward) ** 0.5
            moved = [training[example, j].item() - own[example, j].item() for j in kept]
            assert found[example, domain].item() == pytest.approx(
                sum(one * other for one, other in zip(toward, moved, strict=True)) / length)


def test_a_training_set_that_says_what_the_model_says_moves_nothing_and_two_domains_move_oppositely():
    own, answers = random(4, 6), random(2, 6, seed=1)
    assert not rivals.projection_difference(own, own, answers).any()
    first, second = rivals.projection_difference(own + answers[0] - answers[1], own, answers).mean(0).tolist()
    assert first > 0 and second == pytest.approx(-first)


# --- decoder directions, LogME ------------------------------------------------------------------------------------

def test_closeness_is_the_mean_cosine_of_the_risen_and_the_active():
    rise, answers, decoder = random(7), random(2, 7, seed=1).abs(), random(7, 3, seed=2)
    found = rivals.closeness(rise, answers, decoder, 3)
    for domain in range(2):
        cosines = [torch.nn.functional.cosine_similarity(decoder[one], decoder[other], dim=0).item()
                   for one in np.argsort(-rise.numpy())[:3] for other in np.argsort(-answers[domain].numpy())[:3]]
        assert found[domain].item() == pytest.approx(np.mean(cosines))


def negative_evidence(logs, features, y):
    """Of y = F w + noise by the normal density of y itself, which LogME rewrites."""
    prior, noise = np.exp(logs)
    covariance = features @ features.T / prior + np.eye(len(y)) / noise
    return -multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


@pytest.mark.parametrize("width", [3, 40])
def test_logme_is_the_largest_evidence_that_an_optimiser_finds(width):
    rng = np.random.default_rng(width)
    features, labels = rng.standard_normal((20, width)), rng.integers(0, 2, 20)
    largest = [-min(minimize(negative_evidence, start, (features, (labels == label).astype(float)),
                             method="Nelder-Mead").fun for start in ([0, 0], [2, 2], [4, 1])) / 20 for label in (0, 1)]
    assert rivals.logme(features, labels) == pytest.approx(np.mean(largest), abs=2e-3)


def test_logme_is_higher_where_features_tell_the_labels():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((40, 12)), np.arange(40) % 2
    told = features + 3 * labels[:, None] * np.eye(12)[0]
    assert rivals.logme(told, labels) > rivals.logme(features, labels) + 0.1


# --- signs --------------------------------------------------------------------------------------------------------

def test_signs_are_counted_with_an_exact_interval_and_no_change_is_left_out():
    forecast = np.array([1.0, 2.0, -1.0, -3.0, 0.0, 5.0, 1.0])
    change = np.array([2.0, -1.0, -1.0, 1.0, -2.0, 0.0, 3.0])
    found = rivals.signs(forecast, change, blind=-0.5)
    assert (found["n"], found["share"]) == (6, 0.5) and found["table"] == [[2, 1], [1, 2]]
    assert (found["low"], found["high"]) == pytest.approx(proportion_confint(3, 6, method="beta"))
    assert found["lead"]["mean"] == pytest.approx(3 / 6 - 3 / 6)
    with pytest.raises(StsError, match="No domain moved"):
        rivals.signs(forecast, 0 * change)


# --- forecasts with an interval -----------------------------------------------------------------------------------

def naive_jackknife(x, y, new, level):
    lower, upper = [], []
    for left_out in range(len(x)):
        others = np.arange(len(x)) != left_out
        line = linregress(x[others], y[others])
        away = abs(y[left_out] - line.intercept - line.slope * x[left_out])
        fitted = line.intercept + line.slope * new
        lower.append(fitted - away)
        upper.append(fitted + away)
    alpha = 1 - level
    return (sorted(lower)[int(np.floor(alpha * (len(x) + 1) + 1e-9)) - 1],
            sorted(upper)[int(np.ceil((1 - alpha) * (len(x) + 1) - 1e-9)) - 1])


def test_the_jackknife_is_barbers_formula():
    rng = np.random.default_rng(1)
    x, y, new = rng.standard_normal(15), rng.standard_normal(15), rng.standard_normal(4)
    found = rivals.jackknife_plus(x, y, new, 0.8)
    np.testing.assert_allclose(found, np.transpose([naive_jackknife(x, y, one, 0.8) for one in new]))
    with pytest.raises(StsError, match="takes 9 points; there are 8"):
        rivals.jackknife_plus(x[:8], y[:8], new, 0.9)


@pytest.mark.parametrize("n, spoilt", [(14, False), (30, True)])
def test_coverage_is_nominal_among_exchangeable_points(n, spoilt):
    """Also where the forecast is worthless and the noise has heavy tails."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(600):
        x = rng.standard_normal(n + 1)
        y = rng.standard_t(2, n + 1) + (0 if spoilt else 2 * x)
        low, high = rivals.jackknife_plus(x[:-1], y[:-1], x[-1:], 0.8)
        inside.append(low[0] <= y[-1] <= high[0])
    assert np.mean(inside) == pytest.approx(0.8, abs=0.05) or 0.8 <= np.mean(inside) <= 0.88


def test_a_score_that_tells_the_change_makes_intervals_narrower():
    rng = np.random.default_rng(0)
    score = rng.uniform(0, 1, 40)
    change = 3 * score + 0.1 * rng.standard_normal(40)
    case = (score[:20], change[:20], score[20:], change[20:])
    found, none = rivals.coverage([case], 0.9), rivals.coverage([(change[20:], *case[1:])], 0.9)
    assert found["n"] == 20 and found["share"] > 0.7 and found["narrower"] > 0.5
    assert found["width"] < found["spread"] and none["narrower"] < 0.2
