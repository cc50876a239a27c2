"""Concentration and overlap against naive computations and scipy."""

import numpy as np
import pytest
import scipy.stats
import torch

from sts.errors import StsError
from sts.measure.score import concentrations, overlap_rows, same_fraction

CHANGE_FL = torch.tensor([[8.0, 1, 0, 1], [6, 2, 1, 1], [1, 9, 0, 0]])


def test_shares_by_hand():
    found = concentrations(CHANGE_FL)
    assert found.index.tolist() == [1, 2, 3, 4]
    # In all 30: latents carry 15, 12, 1, 2.
    assert found["share"].tolist() == pytest.approx([15 / 30, 27 / 30, 29 / 30, 1])
    # Fold 1 by the order of the others' 7, 11, 1, 1: it has 1, 9, 9, 10. Fold 2 by 9, 10, 0, 1: 2, 8, 9, 10.
    # Fold 3 by 14, 3, 1, 2: 1, 10, 10, 10.
    assert found["held_out"].tolist() == pytest.approx([(1 + 2 + 1) / 30, (9 + 8 + 10) / 30, (9 + 9 + 10) / 30, 1])
    assert (found.loc[2, "share"], found.loc[2, "held_out"]) == pytest.approx((0.9, 0.9))


def test_the_interval_is_the_jackknife_of_folds_with_students_t():
    generator = np.random.default_rng(3)
    change_FL = torch.from_numpy(generator.exponential(size=(6, 40)) * generator.exponential(5, size=40))
    found = concentrations(change_FL, 10)
    carried = []
    for fold in range(6):
        others = np.delete(change_FL.numpy(), fold, 0).sum(0)
        carried.append(change_FL.numpy()[fold][np.argsort(-others)[:10]].sum())
    total = change_FL.numpy().sum(1)
    left_out = [(sum(carried) - carried[fold]) / (total.sum() - total[fold]) for fold in range(6)]
    error = np.sqrt(5 / 6 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    at = found.loc[10]
    expected = scipy.stats.t(5, loc=sum(carried) / total.sum(), scale=error).interval(0.95)
    assert [at["low"], at["high"]] == pytest.approx(expected)
    assert at["low"] < at["held_out"] < at["high"] <= 1
    assert at["held_out"] < at["share"]  # chosen on the same questions, the chosen look better


def test_the_interval_covers_the_true_ratio():
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(600):
        change_FL = np.column_stack([generator.exponential(1, 8), 2 + generator.exponential(1, 8)])
        found = concentrations(torch.from_numpy(change_FL), random_orders=2).loc[1]
        missed += not found["low"] <= 0.75 <= found["high"]
    assert missed / 600 < 0.08  # percentiles of resampled folds miss about 12%


def test_random_orders_lie_about_the_diagonal():
    change_FL = torch.rand(4, 300, generator=torch.Generator().manual_seed(0))
    found = concentrations(change_FL)
    assert (found["random_low"] <= found.index / 300 + 1e-9).all()
    assert (found["random_high"] >= found.index / 300 - 1e-9).all()
    # A mean of 150 of 300 uniform values: half the sum, give or take two standard errors without replacement.
    spread = change_FL.sum(0).numpy().std() * np.sqrt(150 * 0.5) / change_FL.sum().item()
    wide = concentrations(change_FL, 150, random_orders=2000)
    assert wide.loc[150, "random_high"] - 0.5 == pytest.approx(1.96 * spread, rel=0.1)


def test_changes_that_cannot_be_judged_are_said():
    with pytest.raises(StsError, match="1 fold"):
        concentrations(CHANGE_FL[:1])
    with pytest.raises(StsError, match="No latent changed"):
        concentrations(torch.zeros(2, 5))


def test_overlap_with_chance_and_exact_p():
    first = torch.tensor([9.0, 8, 7, 0, 0, 0, 0, 0, 0, 1])
    second = torch.tensor([5.0, 0, 4, 3, 2, 1, 0, 0, 0, 0])  # five active latents
    row, = overlap_rows(first, second, [3])
    # {0, 1, 2} and {0, 2, 3}.
    assert (row["n"], row["overlap"], row["share"], row["chance"]) == (3, 2, pytest.approx(2 / 3), 0.3)
    # P(at least 2 of 3 marked among 10 when 3 are drawn) = (C(3,2) C(7,1) + C(3,3)) / C(10,3) = 22 / 120.
    assert row["p"] == pytest.approx(22 / 120)
    # Of the five active ones {0, 2} are in the first set and three in the second: P(both) = C(3,1) / C(5,3) = 3 / 10.
    assert row["active"] == 5 and row["active_chance"] == pytest.approx(2 / 5)
    assert row["active_p"] == pytest.approx(3 / 10)
    beyond, = overlap_rows(first, second, [6])
    assert beyond["active_p"] is None and beyond["active_chance"] is None


def test_chance_and_p_by_simulation():
    generator = np.random.default_rng(0)
    first, second = torch.from_numpy(generator.random(80)), torch.from_numpy(generator.random(80))
    row, = overlap_rows(first, second, [20])
    drawn = np.array([len(set(generator.permutation(80)[:20]) & set(range(20))) for _ in range(20_000)])
    assert row["chance"] * 20 == pytest.approx(drawn.mean(), abs=0.05)
    assert row["p"] == pytest.approx((drawn >= row["overlap"]).mean(), abs=0.015)
    assert (drawn / 20 < row["chance_low"]).mean() <= 0.025 and (drawn / 20 > row["chance_high"]).mean() <= 0.03
    assert row["p"] == pytest.approx(scipy.stats.hypergeom(80, 20, 20).sf(row["overlap"] - 1))


def test_equal_fractions_of_different_widths():
    assert same_fraction(100, 4608, 576) == 12  # 12.5 to even
    assert same_fraction(1, 4608, 576) == 1
