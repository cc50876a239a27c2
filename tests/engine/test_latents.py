"""Streamed sums against dense float64 tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sts.engine.latents import LatentStats, PairedStats


def random_chunk(tokens, latents, share, seed):
    generator = torch.Generator().manual_seed(seed)
    values_TL = torch.randn(tokens, latents, generator=generator).abs() + 0.1
    return values_TL * (torch.rand(tokens, latents, generator=generator) < share)


@settings(deadline=None)  # the first call of an operation takes longer
@given(tokens=st.integers(0, 30), latents=st.integers(1, 12), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
       seed=st.integers(0, 1000), cut=st.integers(0, 30))
def test_sums_over_chunks_equal_the_dense_sums(tokens, latents, share, seed, cut):
    base_TL, icl_TL = random_chunk(tokens, latents, share, seed), random_chunk(tokens, latents, share, seed + 1)
    stats = PairedStats(latents)
    for rows in (slice(0, cut), slice(cut, None)):
        stats.add(base_TL[rows], icl_TL[rows])
    base_TL, icl_TL = base_TL.double(), icl_TL.double()
    assert stats.tokens == tokens
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(stats.squared_difference_L, (icl_TL - base_TL).square().sum(0), **close)
    torch.testing.assert_close(stats.difference_L, (icl_TL - base_TL).sum(0), **close)
    torch.testing.assert_close(stats.base.sum_L, base_TL.sum(0), **close)
    torch.testing.assert_close(stats.icl.square_sum_L, icl_TL.square().sum(0), **close)
    torch.testing.assert_close(stats.icl.fired_L, (icl_TL > 0).sum(0).double())
    if tokens:
        torch.testing.assert_close(stats.base.max_L, base_TL.amax(0), **close)


def test_small_changes_of_large_values_survive():
    # 1e4 against 1e4 + 1: summing squares and products apart would lose the difference in float32.
    base_TL = torch.full((1000, 1), 1e4)
    stats = PairedStats(1)
    stats.add(base_TL, base_TL + 1)
    assert stats.squared_difference_L.item() == 1000
    total = LatentStats(1)
    for _ in range(1000):
        total.add(base_TL)
    assert total.square_sum_L.item() == 1e8 * 1e6  # exact in float64, not in float32


def test_tensors_for_storage_hold_every_sum():
    stats = PairedStats(3)
    stats.add(torch.ones(2, 3), torch.full((2, 3), 3.0))
    flat = stats.to_tensors()
    assert flat["tokens"].tolist() == [2.0] and flat["icl_max_L"].tolist() == [3.0] * 3
    assert flat["squared_difference_L"].tolist() == [8.0] * 3
    assert {tensor.dtype for tensor in flat.values()} == {torch.float64}
    with pytest.raises(AttributeError):
        stats.base.max_T  # noqa: B018  # a misspelt sum is no silent zero


def test_dense_differences_in_bfloat16_are_taken_in_float64():
    base_TL, icl_TL = torch.full((1000, 1), 0.30078125).bfloat16(), torch.full((1000, 1), 100.0).bfloat16()
    stats = PairedStats(1)
    stats.add(base_TL, icl_TL)
    assert stats.squared_difference_L.item() == pytest.approx(1000 * (100 - 0.30078125) ** 2, rel=1e-9)
