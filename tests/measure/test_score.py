"""Shifted dimensions and both score variants against plain formulas on small tensors."""

import numpy
import pytest
import torch

from sts.engine.latents import PairedStats
from sts.errors import StsError
from sts.measure import baselines, score
from sts.measure.score import concentration, overlap, score_domain, score_domains, shifted_dimensions
from sts.run import recorded

generator = numpy.random.default_rng(5)
TRAIN_BASE, TRAIN_ICL = generator.gamma(1.0, size=(2, 30, 12))
DOMAINS = {name: generator.gamma(shape, size=(2, 20, 12)) for name, shape in (("law", 0.5), ("physics", 2.0))}


def stats(base, icl):
    paired = PairedStats(12)
    # In two chunks, as extraction would.
    paired.add(torch.tensor(base[:7]), torch.tensor(icl[:7]))
    paired.add(torch.tensor(base[7:]), torch.tensor(icl[7:]))
    return paired.to_tensors()


def test_shifted_dimensions_are_the_largest_mean_squared_changes():
    change = ((TRAIN_ICL - TRAIN_BASE) ** 2).mean(axis=0)
    expected = sorted(range(12), key=lambda j: -change[j])[:4]
    assert shifted_dimensions(stats(TRAIN_BASE, TRAIN_ICL)["squared_difference_L"], 4).tolist() == expected


def test_paper_variant_is_the_papers_formula():
    change = ((TRAIN_ICL - TRAIN_BASE) ** 2).mean(axis=0)
    top = numpy.argsort(-change)[:5]
    rows = score_domains("paper", stats(TRAIN_BASE, TRAIN_ICL),
                         {name: stats(*pair) for name, pair in DOMAINS.items()}, 5)
    for row in rows:
        base, icl = DOMAINS[row["domain"]]
        # E_i sum_j h_j(x_i)   and   E_i sum_j ||h_j(with demonstrations) - h_j(without)||^2
        act = numpy.mean([sum(token[j] for j in top) for token in base])
        shift = numpy.mean([sum((b[j] - a[j]) ** 2 for j in top) for a, b in zip(base, icl, strict=True)])
        assert row["sts_act"] == pytest.approx(act, rel=1e-12)
        assert row["sts_icl"] == pytest.approx(shift, rel=1e-12)
        assert row["tokens"] == 20


def test_official_variant_averages_squares_over_tokens_and_latents():
    base, icl = DOMAINS["law"]
    top = torch.tensor([3, 0, 7])
    scored = score_domain("official_code", stats(base, icl), top)
    assert scored["sts_act"] == pytest.approx((base[:, [3, 0, 7]] ** 2).mean(), rel=1e-12)
    assert scored["sts_icl"] == pytest.approx(((icl - base)[:, [3, 0, 7]] ** 2).mean(), rel=1e-12)


def test_a_changed_formula_changes_random_sets_and_what_is_recorded_too(monkeypatch):
    shift, domains = stats(TRAIN_BASE, TRAIN_ICL), {name: stats(*pair) for name, pair in DOMAINS.items()}
    before = baselines.random_set_scores("uniform", shift, domains, 3, 4, seed=1)
    monkeypatch.setitem(score.FORMULAS, "paper", score.FORMULAS["official_code"])
    after = baselines.random_set_scores("uniform", shift, domains, 3, 4, seed=1)
    torch.testing.assert_close(after["icl_RD"], before["icl_RD"] / 3)  # a mean over the set, not a sum
    assert not torch.allclose(after["act_RD"], before["act_RD"] / 3)  # squares
    kept = recorded.CHANGED["domain_stats"]({f"law/{name}": 0 for name in shift})
    assert set(kept) == {"law/tokens", "law/base_square_sum_L", "law/squared_difference_L"}


def test_ties_go_to_the_lower_index():
    assert shifted_dimensions(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("top_n", [0, 13, 5000])
def test_more_latents_than_the_sae_has_is_an_error_that_names_the_limit(top_n):
    with pytest.raises(StsError, match=f"{top_n} most shifted.*between 1 and 12"):
        shifted_dimensions(torch.ones(12), top_n)


def test_nan_change_is_an_error():
    with pytest.raises(StsError, match="NaN"):
        shifted_dimensions(torch.tensor([1.0, float("nan")]), 1)


def test_concentration_by_hand():
    torch.testing.assert_close(concentration(torch.tensor([1.0, 6.0, 3.0])), torch.tensor([0.6, 0.9, 1.0]))
    with pytest.raises(StsError, match="No latent changed"):
        concentration(torch.zeros(3))


def test_overlap_counts_shared_indices():
    assert overlap(torch.tensor([1, 2, 3]), torch.tensor([3, 9, 1])) == 2
