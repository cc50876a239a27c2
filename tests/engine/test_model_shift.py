"""Two models on the same tokens, against transformers' own hidden states; raw dimensions through the same code."""

import pytest
import torch
from helpers import topk_sae
from test_activations import DEMONSTRATIONS, QUESTIONS, naive_latents

from sts.data.prompts import make_group, make_prompt, paired_positions, question_text, solution_prompt
from sts.engine.extract import Masks, paired_stats
from sts.engine.extract import folded, model_paired_folds, model_paired_stats
from sts.engine.models import load_model
from sts.engine.saes import check_fits, identity_sae
from sts.errors import StsError


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
    stats = model_paired_stats(*two_models, sae, 0, prompts, Masks(outlier_norm=0), tokens_per_batch=tokens_per_batch)
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
    assert model_paired_stats(lm, lm, topk_sae(64), 0, prompts, Masks()).squared_difference_L.max() == 0


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
    stats = model_paired_stats(lm, tuned, topk_sae(64), 0, prompts, Masks(outlier_norm=1.05))
    assert stats.base.tokens == stats.icl.tokens == expected
    assert min(int((own <= limit).sum()) for own in norms) > expected


def test_masks_that_leave_nothing_are_an_error(two_models, prompts):
    with pytest.raises(StsError, match="No token is left"):
        model_paired_stats(*two_models, topk_sae(64), 0, prompts, Masks(drop_first_positions=10_000))


def test_folds_add_up_to_the_whole(two_models, prompts):
    sae, masks = topk_sae(64), Masks(outlier_norm=0)
    whole = model_paired_stats(*two_models, sae, 0, prompts, masks).to_tensors()
    parts = [model_paired_stats(*two_models, sae, 0, prompts[fold::2], masks) for fold in range(2)]
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
    check_fits(sae, lm, 0)
    stats = model_paired_stats(lm, tuned, sae, 0, prompts, Masks(outlier_norm=0))
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
    with pytest.raises(StsError, match="q0 has .* tokens with its solution; the model's context is 10"):
        solution_prompt(lm.tokenizer, QUESTIONS[0], context_length=10)
