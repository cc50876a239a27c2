"""Streamed sums against dense float64 tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sts.engine.latents import LatentStats, PairedStats, SparseLatents


def random_chunk(tokens, latents, share, seed):
    generator = torch.Generator().manual_seed(seed)
    values_TL = torch.randn(tokens, latents, generator=generator).abs() + 0.1
    return values_TL * (torch.rand(tokens, latents, generator=generator) < share)


@given(tokens=st.integers(0, 30), latents=st.integers(1, 12), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
       seed=st.integers(0, 1000), cut=st.integers(0, 30), sparse=st.booleans())
def test_sums_over_chunks_equal_the_dense_sums(tokens, latents, share, seed, cut, sparse):
    base_TL, icl_TL = random_chunk(tokens, latents, share, seed), random_chunk(tokens, latents, share, seed + 1)
    stats = PairedStats.empty(latents)
    for rows in (slice(0, cut), slice(cut, None)):
        pair = (base_TL[rows], icl_TL[rows])
        stats.add(*(SparseLatents.of(part) if sparse else part for part in pair))
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
    stats = PairedStats.empty(1)
    stats.add(SparseLatents.of(base_TL), SparseLatents.of(base_TL + 1))
    assert stats.squared_difference_L.item() == 1000
    total = LatentStats(1)
    for _ in range(1000):
        total.add(SparseLatents.of(base_TL))
    assert total.square_sum_L.item() == 1e8 * 1e6  # exact in float64, not in float32


def test_a_sparse_tensor_with_unsorted_and_zero_entries_reads_like_its_dense_form():
    indices = torch.tensor([[1, 0, 0, 1], [2, 3, 0, 1]])
    chunk = SparseLatents.of(torch.sparse_coo_tensor(indices, torch.tensor([5.0, 1.0, 0.0, 2.0]), (2, 4)))
    assert chunk.rows_N.tolist() == [0, 1, 1] and chunk.latents_N.tolist() == [3, 1, 2]
    assert chunk.values_N.tolist() == [1.0, 2.0, 5.0]


def test_tensors_for_storage_hold_every_sum():
    stats = PairedStats.empty(3)
    stats.add(torch.ones(2, 3), torch.full((2, 3), 3.0))
    flat = stats.to_tensors()
    assert flat["tokens"].tolist() == [2.0] and flat["icl_max_L"].tolist() == [3.0] * 3
    assert flat["squared_difference_L"].tolist() == [8.0] * 3
    assert {tensor.dtype for tensor in flat.values()} == {torch.float64}
    with pytest.raises(AttributeError):
        stats.base.max_T  # noqa: B018  # a misspelt sum is no silent zero


def test_dense_differences_in_bfloat16_are_taken_in_float64():
    base_TL, icl_TL = torch.full((1000, 1), 0.30078125).bfloat16(), torch.full((1000, 1), 100.0).bfloat16()
    stats = PairedStats.empty(1)
    stats.add(base_TL, icl_TL)
    assert stats.squared_difference_L.item() == pytest.approx(1000 * (100 - 0.30078125) ** 2, rel=1e-9)
