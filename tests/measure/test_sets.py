"""Sets of latents to zero: who is in them, what they hold, and when no match is possible."""

import numpy as np
import pytest
import scipy.stats
import torch

from sts.errors import StsError
from sts.measure.sets import matched_latents, random_latents, sets_to_zero

GENERATOR = np.random.default_rng(1)
#: Heavy-tailed like an SAE's: a few latents hold most of the energy.
ENERGY_L = torch.from_numpy(GENERATOR.lognormal(0, 1.3, 1000))
#: Active latents change more, as fine-tuning has it; yet others change too.
CHANGE_L = ENERGY_L**0.7 * torch.from_numpy(GENERATOR.lognormal(0, 1, 1000))


def test_every_kind_holds_what_its_name_says():
    sets = sets_to_zero(CHANGE_L, ENERGY_L, [5, 40], 3, 1, ENERGY_L)
    assert [(one.kind, one.count) for one in sets].count(("random", 40)) == 3
    assert len(sets) == 1 + 2 * (2 + 3 * 3) and (sets[0].kind, len(sets[0].latents)) == ("none", 0)
    for one in sets[1:]:
        own, most = set(one.latents.tolist()), set(CHANGE_L.topk(one.count).indices.tolist())
        assert len(own) == one.count and one.energy == pytest.approx(sum(ENERGY_L[j].item() for j in own))
        expected = {"most_shifted": most, "most_active": set(ENERGY_L.topk(one.count).indices.tolist())}
        assert own == expected[one.kind] if one.kind in expected else not own & most


def test_matched_sets_hold_the_energy_and_random_ones_do_not():
    for seed in range(4):
        sets = sets_to_zero(CHANGE_L, ENERGY_L, [10, 40], 5, seed, ENERGY_L)
        for count in (10, 40):
            energy = {kind: np.array([one.energy for one in sets if (one.kind, one.count) == (kind, count)])
                      for kind in ("most_shifted", "most_active", "random", "matched")}
            assert energy["matched"] == pytest.approx(energy["most_shifted"][0], rel=0.1)
            assert energy["random"].mean() < 0.5 * energy["most_shifted"][0] < 0.5 * energy["most_active"][0]
    assert all(one.usable for one in sets)


def test_draws_and_seeds_differ_and_repeat():
    def drawn(seed: int) -> list[tuple]:
        return [tuple(one.latents.tolist()) for one in sets_to_zero(CHANGE_L, ENERGY_L, [40], 3, seed, ENERGY_L)
                if one.kind in ("random", "matched")]

    assert len(set(drawn(0))) == len(set(drawn(0) + drawn(1))) - 6 == 6
    assert drawn(0) == drawn(0)


@pytest.mark.parametrize(("others", "usable"), [(0.5, False), (0.85, False), (0.95, True), (1.0, True)])
def test_a_set_that_cannot_reach_the_energy_is_not_used(others, usable):
    # Ten shifted latents of energy 2 each, and all others weaker by one factor.
    energy_L = torch.full((60,), 2 * others, dtype=torch.float64)
    change_L = torch.zeros(60)
    energy_L[:10], change_L[:10] = 2, 1
    sets = sets_to_zero(change_L, energy_L, [10], 3, 0, torch.ones(60))
    matched = [one for one in sets if one.kind == "matched"]
    assert [one.usable for one in matched] == [usable] * 3
    assert matched[0].energy == pytest.approx(20 * others)
    assert all(one.usable for one in sets if one.kind != "matched")


def test_a_single_set_that_matches_does_not_say_how_sets_differ():
    # A partner of the right energy is one of three nearest; draws without it fall short.
    energy_L = torch.tensor([1.0, 1.0, 0.5, 0.4, 0.0, 0.0], dtype=torch.float64)
    change_L = torch.tensor([1.0, 0, 0, 0, 0, 0])
    found = {}
    for seed in range(40):
        matched = [one for one in sets_to_zero(change_L, energy_L, [1], 3, seed, energy_L) if one.kind == "matched"]
        near = sum(one.energy == 1 for one in matched)
        found[near] = [one.usable for one in matched]
        assert sum(found[near]) == (near if near >= 2 else 0)
    assert set(found) >= {0, 1, 2}


def test_partners_have_like_energies_one_by_one():
    chosen = torch.argsort(ENERGY_L)[300:700:4]
    wanted, found = (torch.sort(ENERGY_L[own]).values for own in (chosen, matched_latents(ENERGY_L, chosen, 0)))
    assert ((wanted / found > 0.75) & (wanted / found < 1.33)).all()
    assert matched_latents(ENERGY_L, chosen, 1).tolist() != matched_latents(ENERGY_L, chosen, 0).tolist()


def test_what_one_partner_lacks_the_next_make_up():
    # Nothing is as strong as the first, so 12 or more of the 70 must come from stronger partners of the others.
    energy_L = torch.tensor([30.0, *[2] * 20, 18, 17, 16, *[6] * 5, *[2] * 20, *[1] * 20, *[0.5] * 20],
                            dtype=torch.float64)
    for seed in range(10):
        assert energy_L[matched_latents(energy_L, torch.arange(21), seed)].sum() == pytest.approx(70, rel=0.03)


def test_silent_latents_are_matched_with_silent_or_weak_ones():
    energy_L = torch.tensor([0.0, 100, 50, 0, 0, 0, 0, 80], dtype=torch.float64)
    assert set(matched_latents(energy_L, torch.tensor([0]), 0).tolist()) <= {3, 4, 5, 6}
    assert len(matched_latents(torch.zeros(6), torch.tensor([0, 1]), 0)) == 2


def test_random_sets_leave_the_chosen_out_and_are_even():
    chosen = torch.tensor([0, 3, 9])
    counts = np.zeros(10)
    for seed in range(700):
        found = random_latents(10, chosen, seed)
        assert len(set(found.tolist())) == 3
        counts[found] += 1
    assert counts[[0, 3, 9]].sum() == 0
    assert scipy.stats.chisquare(np.delete(counts, [0, 3, 9])).pvalue > 0.001


def test_more_than_half_of_the_latents_are_refused():
    for draw, of in ((random_latents, 8), (matched_latents, torch.ones(8))):
        with pytest.raises(StsError, match="5 latents were chosen, and the 3 others .* at most 4"):
            draw(of, torch.arange(5), 0)


def test_sets_of_like_rate_have_the_rate():
    rate_L = torch.from_numpy(np.random.default_rng(5).beta(0.3, 6, 1000))
    sets = sets_to_zero(CHANGE_L, ENERGY_L, [10, 40], 3, 0, rate_L)
    for count in (10, 40):
        most = next(one for one in sets if (one.kind, one.count) == ("most_shifted", count))
        like = [one for one in sets if (one.kind, one.count) == ("like_rate", count)]
        assert len(like) == 3 and all(one.usable for one in like)
        for one in like:
            assert not set(one.latents.tolist()) & set(most.latents.tolist())
            assert rate_L[one.latents].sum().item() == pytest.approx(rate_L[most.latents].sum().item(), rel=0.1)
            assert one.energy == pytest.approx(ENERGY_L[one.latents].sum().item())
