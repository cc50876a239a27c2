"""Extraction against transformers' own hidden states and a naive dense computation."""

import pytest
import torch
from helpers import topk_sae

from sts.data.load import Example, load_examples
from sts.data.prompts import (
    Prompt,
    PromptGroup,
    make_group,
    make_prompt,
    paired_positions,
    question_text,
    solution_prompt,
)
from sts.engine import latents
from sts.engine.extract import (
    Masks,
    folded,
    model_paired_folds,
    paired_stats,
    row_paired_stats,
)
from sts.engine.latents import encode_chunks
from sts.engine.models import load_model
from sts.engine.residuals import Extractor
from sts.engine.saes import identity_sae
from sts.engine.work import Work
from sts.errors import StsError

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
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
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
    plain = paired_stats(lm, sae, 0, groups, Masks()).tokens
    ordinary = Extractor.tokens

    def with_a_sink(self, sides, *prefix):
        residual_TD = ordinary(self, sides, *prefix).clone()
        # One token in each prompt hardly moves the median that the threshold is taken from.
        if (sides[0][0] in [prompt.ids for prompt in groups[0].icl]) == behind_demonstrations:
            first = torch.tensor([0, *(last - first for _, (first, last) in sides)]).cumsum(0)[:-1]
            residual_TD[first + 1] *= 1e4  # one question token of each prompt
        return residual_TD

    monkeypatch.setattr(Extractor, "tokens", with_a_sink)
    assert paired_stats(lm, sae, 0, groups, Masks()).tokens == plain - len(QUESTIONS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_one_clear_error(lm_of, value):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    weight = lm.model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(value)
        with pytest.raises(StsError, match="NaN.*float32"):
            paired_stats(lm, sae, 0, groups, Masks())
    finally:
        weight.data.copy_(kept)


def test_masks_that_leave_nothing_are_an_error(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    with pytest.raises(StsError, match="No token is left.*drop_first_positions"):
        paired_stats(lm, sae, 0, groups, Masks(drop_first_positions=5_000))


# --- other groups, other SAEs -------------------------------------------------------------------------------------

def test_a_question_behind_two_sets_of_demonstrations_counts_in_both(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2]),
              make_group(lm.tokenizer, QUESTIONS[1:], DEMONSTRATIONS[2:5])]
    once, twice = Work(), Work()
    together = paired_stats(lm, sae, 0, groups, Masks(outlier_norm=0), work=once)
    apart = [paired_stats(lm, sae, 0, [group], Masks(outlier_norm=0), work=twice) for group in groups]
    assert together.tokens == sum(stats.tokens for stats in apart)
    # Without demonstrations, the second group's questions have been run already, and what they all begin with.
    assert twice.tokens - once.tokens == sum(prompt.question[1] for prompt in groups[1].base) - (
        len(groups[1].base) - 1) * groups[1].base[0].question[0]
    torch.testing.assert_close(together.squared_difference_L, sum(stats.squared_difference_L for stats in apart),
                               rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "dense"])
def test_saes_of_every_architecture_are_summed_alike(lm_of, architecture):
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    lm = lm_of("llama")
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    with torch.no_grad():
        sample_TD = lm.model(torch.tensor([groups[0].icl[0].ids]), output_hidden_states=True).hidden_states[1][0]
    torch.manual_seed(1)
    weights_DL = torch.randn(64, 96)
    usual = (sample_TD @ weights_DL).quantile(0.9).item()  # one latent in ten exceeds this
    if architecture == "topk":
        sae = topk_sae(64)
    elif architecture == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=96))
        sae.threshold.data.fill_(usual)
    else:
        sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=96))
        sae.b_enc.data.fill_(-usual if architecture == "standard" else 10 * usual)
    if architecture != "topk":
        sae.W_enc.data = weights_DL
    chosen = paired_stats(lm, sae, 0, groups, Masks(outlier_norm=0))
    base_TL, icl_TL = [], []
    for base, icl in zip(groups[0].base, groups[0].icl, strict=True):
        at_base, at_icl = paired_positions(base, icl, drop_first_positions=1)
        for prompt, places, column in ((base, at_base, base_TL), (icl, at_icl, icl_TL)):
            with torch.no_grad():
                states = lm.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0]
                column.append(sae.encode(states[places]).double())
    base_TL, icl_TL = torch.cat(base_TL), torch.cat(icl_TL)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(chosen.squared_difference_L, (icl_TL - base_TL).square().sum(0), **close)
    torch.testing.assert_close(chosen.icl.square_sum_L, icl_TL.square().sum(0), **close)
    torch.testing.assert_close(chosen.icl.max_L, icl_TL.amax(0), **close)
    torch.testing.assert_close(chosen.base.fired_L, (base_TL > 0).sum(0).double())


def test_chunks_bound_the_memory_and_change_nothing(monkeypatch):
    sae, residual_TD = topk_sae(64), torch.randn(50, 64)
    (_, whole), = encode_chunks(sae, residual_TD, residual_TD + 1)
    monkeypatch.setattr(latents, "CHUNK_VALUES", 7 * 96)  # seven tokens at a time
    parts = list(encode_chunks(sae, residual_TD, residual_TD + 1))
    assert len(parts) == 8 and all(len(part_TL) <= 7 for _, part in parts for part_TL in part)
    with torch.no_grad():
        for side, x_TD in enumerate((residual_TD, residual_TD + 1)):
            torch.testing.assert_close(torch.cat([part[side] for _, part in parts]), whole[side], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(whole[side], sae.encode(x_TD), rtol=1e-5, atol=1e-5)


def test_equal_seeds_give_equal_bits(lm_of):
    lm, sae = lm_of("gemma2"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:3])]
    first, second = (paired_stats(lm, sae, 0, groups, Masks()).to_tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_with_an_outlier_norm_are_left_out(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    every, fewer = (paired_stats(lm, sae, 0, groups, Masks(outlier_norm=norm)).tokens for norm in (0, 1.0))
    assert 0.05 * every < fewer < 0.8 * every


def test_a_question_may_pair_over_other_spans_behind_other_demonstrations(lm_of):
    # Without masks the pairing begins where the prompts begin to agree, which depends on the group.
    lm, sae = lm_of("llama"), topk_sae(64)
    rows = Masks(question_tokens_only=False, outlier_norm=0, drop_first_positions=0)
    base = Prompt((7, 8, 9, 20, 21, 22, 23), (3, 7))
    groups = [PromptGroup((base,), (Prompt((50, 51, 8, 9, 20, 21, 22, 23), (4, 8)),)),
              PromptGroup((base,), (Prompt((60, 61, 62, 63, 20, 21, 22, 23), (4, 8)),))]
    together = paired_stats(lm, sae, 0, groups, rows)
    apart = [paired_stats(lm, sae, 0, [group], rows) for group in groups]
    assert [stats.tokens for stats in apart] == [6, 4] and together.tokens == 10
    torch.testing.assert_close(together.squared_difference_L, sum(stats.squared_difference_L for stats in apart),
                               rtol=1e-6, atol=1e-9)
    naive = [naive_latents(lm, sae, 0, prompt).double() for prompt in (base, groups[1].icl[0])]
    torch.testing.assert_close(apart[1].squared_difference_L, (naive[1][4:] - naive[0][3:]).square().sum(0), rtol=1e-4,
                               atol=1e-5)


def test_paired_passes_over_real_questions_are_padded_by_at_most_a_tenth(lm_of):
    lm, sae, work = lm_of("llama"), topk_sae(64), Work()
    examples = load_examples("mmlu_exemplars")[:90]
    groups = [make_group(lm.tokenizer, examples[start:], tuple(examples[:2])) for start in (2, 30)]
    paired_stats(lm, sae, 0, groups, Masks(), work=work, tokens_per_batch=4096)
    assert 0 < work.padded_tokens - work.tokens <= 0.1 * work.padded_tokens


# --- two models ---------------------------------------------------------------------------------------------------

def both(*args, **how):
    return model_paired_folds(*args, **how)[0]


@pytest.fixture(scope="module")
def two_models(tiny_models):
    """A model and a copy with other weights."""
    lm, tuned = (load_model(str(tiny_models["llama"]), dtype="float32") for _ in range(2))
    torch.manual_seed(0)
    for parameter in tuned.model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return lm, tuned


@pytest.fixture(scope="module")
def prompts(two_models):
    return [make_prompt(two_models[0].tokenizer, question_text(example)) for example in QUESTIONS]


@pytest.mark.parametrize("tokens_per_batch", [1, 4096], ids=["one at a time", "all at once"])
def test_statistics_of_two_models_equal_the_naive_computation(two_models, prompts, tokens_per_batch):
    sae = topk_sae(64)
    stats = both(*two_models, sae, 0, prompts, Masks(outlier_norm=0), tokens_per_batch=tokens_per_batch)
    base_TL, tuned_TL = (torch.cat([naive_latents(lm, sae, 0, prompt)[slice(*prompt.question)]
                                    for prompt in prompts]).double() for lm in two_models)
    assert stats.tokens == len(base_TL) == sum(prompt.question[1] - prompt.question[0] for prompt in prompts)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(stats.base.sum_L, base_TL.sum(0), **close)
    torch.testing.assert_close(stats.icl.square_sum_L, tuned_TL.square().sum(0), **close)
    torch.testing.assert_close(stats.squared_difference_L, (tuned_TL - base_TL).square().sum(0), **close)
    assert stats.squared_difference_L.max() > 1e-3


def test_the_same_model_twice_does_not_shift(two_models, prompts):
    lm, _ = two_models
    assert both(lm, lm, topk_sae(64), 0, prompts, Masks()).squared_difference_L.max() == 0


def test_a_token_that_is_an_outlier_in_either_model_counts_in_neither(two_models, prompts):
    lm, tuned = two_models
    norms = []
    for one in two_models:
        with torch.no_grad():
            norms.append(torch.cat([
                one.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
                    slice(*prompt.question)].norm(dim=-1) for prompt in prompts]))
    limit = 1.05 * norms[0].median()
    expected = int(((norms[0] <= limit) & (norms[1] <= limit)).sum())
    stats = both(lm, tuned, topk_sae(64), 0, prompts, Masks(outlier_norm=1.05))
    assert stats.base.tokens == stats.icl.tokens == expected
    assert min(int((own <= limit).sum()) for own in norms) > expected


def test_masks_that_leave_nothing_of_two_models_are_an_error(two_models, prompts):
    with pytest.raises(StsError, match="No token is left"):
        both(*two_models, topk_sae(64), 0, prompts, Masks(drop_first_positions=10_000))


def test_folds_add_up_to_the_whole(two_models, prompts):
    sae, masks = topk_sae(64), Masks(outlier_norm=0)
    whole = both(*two_models, sae, 0, prompts, masks).to_tensors()
    parts = [both(*two_models, sae, 0, prompts[fold::2], masks) for fold in range(2)]
    found = model_paired_folds(*two_models, sae, 0, prompts, masks, 2)
    for part, own in zip(parts, found, strict=True):
        for name, expected in part.to_tensors().items():
            torch.testing.assert_close(own.to_tensors()[name], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(StsError, match="No token is left"):
        model_paired_folds(*two_models, sae, 0, prompts, masks, len(prompts) + 1)
    together = folded(parts)
    for name, expected in whole.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(together["fold_squared_difference_FL"][1], parts[1].squared_difference_L)
    assert together["fold_tokens_F"].tolist() == [part.tokens for part in parts]


def test_raw_dimensions_go_through_the_same_code(two_models, prompts):
    lm, tuned = two_models
    sae = identity_sae(lm)
    stats = both(lm, tuned, sae, 0, prompts, Masks(outlier_norm=0))
    groups = [make_group(lm.tokenizer, QUESTIONS, DEMONSTRATIONS[:2])]
    by_context = paired_stats(lm, sae, 0, groups, Masks(outlier_norm=0))

    def states(one, prompt):
        with torch.no_grad():
            return one.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0].double()

    base_TD, tuned_TD = (torch.cat([states(one, prompt)[slice(*prompt.question)] for prompt in prompts])
                         for one in two_models)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(stats.squared_difference_L, (tuned_TD - base_TD).square().sum(0), **close)
    torch.testing.assert_close(stats.base.sum_L, base_TD.sum(0), **close)
    assert (stats.base.sum_L < 0).any()
    # As its docstring says: positive values count as fired, and a maximum is never below zero.
    torch.testing.assert_close(stats.base.fired_L, (base_TD > 0).sum(0).double())
    torch.testing.assert_close(stats.base.max_L, base_TD.amax(0).clamp(min=0), **close)
    change = 0
    for base, icl in zip(groups[0].base, groups[0].icl, strict=True):
        at_base, at_icl = paired_positions(base, icl, drop_first_positions=1)
        change = change + (states(lm, icl)[at_icl] - states(lm, base)[at_base]).square().sum(0)
    torch.testing.assert_close(by_context.squared_difference_L, change, **close)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_solution_prompts_tokens_are_the_solution(lm_of, family):
    lm = lm_of(family)
    for example in [*QUESTIONS, *DEMONSTRATIONS]:
        prompt = solution_prompt(lm.tokenizer, example)
        assert lm.tokenizer.decode(prompt.ids[slice(*prompt.question)]) == example.solution
        assert lm.tokenizer.decode(prompt.ids).count(example.question) == 1


def test_a_prompt_longer_than_the_context_is_refused(tiny_lm):
    length = tiny_lm.context_length
    with pytest.raises(StsError, match=f"prompt of {length + 1} tokens does not fit the model's context of {length}"):
        Extractor(tiny_lm, 0, 64).tokens([([1] * (length + 1), (0, 2))])
