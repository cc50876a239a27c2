"""Extraction against transformers' own hidden states and a naive dense computation."""

import pytest
import torch

from sts.activations import (
    LatentStats,
    Masks,
    batch_residuals,
    common_prefix,
    paired_stats,
    prefix_cache,
    row_paired_stats,
)
from sts.data import Example
from sts.errors import StsError
from sts.prompts import make_group, make_prompt, paired_positions, question_text

QUESTIONS = [
    Example(f"q{i}", "math", text, (), -1, "7", f"We count. #### {i}")
    for i, text in enumerate([
        "How many sheep has a farmer with 3 pens of 4 sheep?", "What is 12 minus 5?",
        "A train leaves at noon and arrives three hours later; when does it arrive, if it is never late at all?",
        "Half of fourteen?", "Name the seventh month of the year and say how many days it has."])
]
DEMONSTRATIONS = tuple(
    Example(f"d{i}", "math", f"What is {i} plus {i + 1}?", (), -1, str(2 * i + 1), f"{i} + {i + 1} = {2 * i + 1}.")
    for i in range(1, 7))


def topk_sae(width: int, latents: int = 96, k: int = 8, seed: int = 0):
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=latents, k=k))
    sae.b_dec.data = torch.randn(width) * 0.1
    return sae.eval().requires_grad_(False)


def naive_latents(lm, sae, layer, prompt):
    """All hidden states by transformers, one prompt at a time; TopK written out with loops."""
    with torch.no_grad():
        states = lm.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
    hidden_PD = states[layer + 1][0]
    values_PL = (hidden_PD - sae.b_dec) @ sae.W_enc + sae.b_enc
    dense_PL = torch.zeros_like(values_PL)
    for row, values_L in enumerate(values_PL):
        for index in sorted(range(len(values_L)), key=lambda j: -values_L[j].item())[: sae.cfg.k]:
            dense_PL[row, index] = max(0.0, values_L[index].item())
    return dense_PL


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 4096], ids=["one at a time", "small batches", "all at once"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_paired_statistics_equal_the_naive_dense_computation(lm_of, family, tokens_per_batch):
    # 28 prefix tokens and more: longer than Gemma2's sliding window of 32 once the questions follow.
    lm = lm_of(family)
    sae = topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS[:3], DEMONSTRATIONS[:3]),
              make_group(lm.tokenizer, QUESTIONS[3:], DEMONSTRATIONS[3:])]
    stats = paired_stats(lm, sae, 0, groups, Masks(outlier_norm=0), tokens_per_batch=tokens_per_batch)

    base_TL, icl_TL = [], []
    for group in groups:
        for base, icl in zip(group.base, group.icl, strict=True):
            at_base, at_icl = paired_positions(base, icl, drop_first_positions=1)
            base_TL.append(naive_latents(lm, sae, 0, base)[at_base])
            icl_TL.append(naive_latents(lm, sae, 0, icl)[at_icl])
    base_TL, icl_TL = torch.cat(base_TL).double(), torch.cat(icl_TL).double()
    assert stats.tokens == len(base_TL) > 30
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(stats.base.sum_L, base_TL.sum(0), **close)
    torch.testing.assert_close(stats.icl.sum_L, icl_TL.sum(0), **close)
    torch.testing.assert_close(stats.base.square_sum_L, base_TL.square().sum(0), **close)
    torch.testing.assert_close(stats.base.max_L, base_TL.amax(0), **close)
    torch.testing.assert_close(stats.base.fired_L, (base_TL > 0).sum(0).double())
    torch.testing.assert_close(stats.squared_difference_L, (icl_TL - base_TL).square().sum(0), **close)
    torch.testing.assert_close(stats.difference_L, (icl_TL - base_TL).sum(0), **close)
    assert stats.squared_difference_L.sum() > 0  # demonstrations do something, so the comparison is not of zeros


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_cached_prefix_changes_nothing(lm_of, family):
    lm = lm_of(family)
    prompts = [make_prompt(lm.tokenizer, question_text(question), DEMONSTRATIONS) for question in QUESTIONS]
    prefix = common_prefix(tuple(prompts))
    assert prefix > 64  # twice Gemma2's window
    cache = prefix_cache(lm, 1, prompts[0].ids[:prefix])
    full = batch_residuals(lm, 1, prompts)
    for _ in range(2):  # the cache serves every batch, so using it must not change it
        behind = batch_residuals(lm, 1, prompts, prefix, cache)
        for whole_PD, rest_PD in zip(full, behind, strict=True):
            torch.testing.assert_close(rest_PD, whole_PD[prefix:], rtol=1e-4, atol=1e-5)


def test_row_pairing_subtracts_row_r_of_two_separate_runs(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    group = make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])
    stats = row_paired_stats(lm, sae, 0, [group], rows=70, tokens_per_batch=90)
    base_TL = torch.cat([naive_latents(lm, sae, 0, prompt) for prompt in group.base])[:70].double()
    icl_TL = torch.cat([naive_latents(lm, sae, 0, prompt) for prompt in group.icl])[:70].double()
    assert stats.tokens == 70
    torch.testing.assert_close(stats.squared_difference_L, (icl_TL - base_TL).square().sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.base.square_sum_L, base_TL.square().sum(0), rtol=1e-4, atol=1e-5)


def test_row_pairing_stops_at_the_shorter_run(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    group = make_group(lm.tokenizer, QUESTIONS[:2], DEMONSTRATIONS[:2])
    stats = row_paired_stats(lm, sae, 0, [group], rows=10_000)
    assert stats.tokens == sum(len(prompt.ids) for prompt in group.base)


def test_each_mask_can_be_switched_off(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]

    def tokens(**changed):
        return paired_stats(lm, sae, 0, groups, Masks(**changed)).tokens

    own = sum(prompt.question[1] - prompt.question[0] for prompt in groups[0].base)
    assert tokens(outlier_norm=0) == own
    assert tokens(question_tokens_only=False, outlier_norm=0) > own
    # Position 8 of each prompt lies inside the question: eight template and question positions go.
    assert tokens(drop_first_positions=8, outlier_norm=0) < own
    assert tokens(outlier_norm=1.0) < own  # one times the median norm: about half the tokens are above it


@pytest.mark.parametrize("behind_demonstrations", [False, True])
def test_tokens_with_an_outlier_norm_in_either_pass_are_left_out(lm_of, monkeypatch, behind_demonstrations):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    import sts.activations as activations

    plain = paired_stats(lm, sae, 0, groups, Masks()).tokens
    ordinary = activations.batch_residuals

    def with_a_sink(lm, layer, prompts, *rest):
        residuals = ordinary(lm, layer, prompts, *rest)
        if (len(rest) > 0) == behind_demonstrations:  # blow up one question token of each prompt, in one pass
            residuals = [residual.clone() for residual in residuals]
            prefix = rest[0] if rest else 0
            for prompt, residual in zip(prompts, residuals, strict=True):
                residual[prompt.question[0] + 1 - prefix] *= 1e4
        return residuals

    monkeypatch.setattr(activations, "batch_residuals", with_a_sink)
    assert paired_stats(lm, sae, 0, groups, Masks()).tokens == plain - len(QUESTIONS)


def test_nan_activations_are_one_clear_error(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    weight = lm.model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(StsError, match="NaN.*float32"):
            paired_stats(lm, sae, 0, groups, Masks())
    finally:
        weight.data.copy_(kept)


def test_masks_that_leave_nothing_are_an_error(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    with pytest.raises(StsError, match="No token is left.*drop_first_positions"):
        paired_stats(lm, sae, 0, groups, Masks(drop_first_positions=5_000))


def test_latent_stats_add_up_over_chunks():
    torch.manual_seed(0)
    latents_TL = torch.relu(torch.randn(50, 6))
    whole, parts = LatentStats(6), LatentStats(6)
    whole.add(latents_TL)
    for start, stop in ((0, 0), (0, 1), (1, 30), (30, 50)):
        parts.add(latents_TL[start:stop])
    assert whole.tokens == parts.tokens == 50
    for name in ("sum_L", "square_sum_L", "fired_L", "max_L"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    torch.testing.assert_close(whole.sum_L, latents_TL.double().sum(0))
