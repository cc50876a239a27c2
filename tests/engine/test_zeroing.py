"""Zeroed latents against splicing by hand, and generation against a recomputation without a cache."""

import pytest
import torch
from helpers import topk_sae

from sts.data.sources import Example
from sts.engine.evaluate import evaluate
from sts.engine.models import decoder_layers
from sts.engine.work import Work
from sts.engine.zeroing import lower_layers_once, without, zeroed

TEXT = "A farmer has 12 sheep and buys 5 more. How many sheep does the farmer have now?"
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3"]


def ids_of(lm, text=TEXT):
    return torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])


def logits_of(lm, ids, **inputs):
    with torch.no_grad():
        return lm.model(ids, **inputs).logits


def by_hand(lm, sae, ids, latents, first=1):
    """Layer 0 run, its output changed with the SAE's weights written out, and the rest run on it."""
    def hook(module, args, output):
        changed = output.clone()
        for position in range(first, ids.shape[1]):
            x = output[0, position]
            values = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            strongest = sorted(range(len(values)), key=lambda j: -values[j].item())[:sae.cfg.k]
            for latent in set(strongest) & set(latents):
                changed[0, position] -= values[latent].clamp(min=0) * sae.W_dec[latent]
        return changed
    handle = decoder_layers(lm.model)[0].register_forward_hook(hook)
    try:
        return logits_of(lm, ids)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_no_latents_reproduces_the_models_logits(lm_of, family):
    lm, sae = lm_of(family), topk_sae(64)
    plain = logits_of(lm, ids_of(lm))
    with zeroed(lm, sae, 0, []):
        assert torch.equal(logits_of(lm, ids_of(lm)), plain)
    # The hook at work on latents that never fire on this text: still the same model.
    with torch.no_grad():
        states = lm.model(ids_of(lm), output_hidden_states=True).hidden_states[1][0]
        silent = (sae.encode(states) > 0).sum(0).eq(0).nonzero().flatten()
    assert len(silent) > 5
    with zeroed(lm, sae, 0, silent):
        torch.testing.assert_close(logits_of(lm, ids_of(lm)), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_latents_subtracts_their_decoded_part(lm_of, family):
    lm, sae = lm_of(family), topk_sae(64)
    ids, plain = ids_of(lm), logits_of(lm, ids_of(lm))
    for latents in (list(range(0, 96, 3)), list(range(96))):
        with zeroed(lm, sae, 0, latents):
            changed = logits_of(lm, ids)
        torch.testing.assert_close(changed, by_hand(lm, sae, ids, latents), rtol=1e-4, atol=1e-4)
        assert (changed - plain).abs().max() > 1e-2
        torch.testing.assert_close(changed[:, 0], plain[:, 0])  # the first token is left alone


def test_zeroing_all_latents_leaves_the_error_and_the_bias(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    seen = []
    handle = decoder_layers(lm.model)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        x = lm.model(ids_of(lm), output_hidden_states=True).hidden_states[1]
        with zeroed(lm, sae, 0, torch.arange(96), drop_first_positions=0):
            logits_of(lm, ids_of(lm))
    handle.remove()
    zeros = torch.zeros(*x.shape[:2], 96)
    torch.testing.assert_close(seen[-1], x - (sae.decode(sae.encode(x)) - sae.decode(zeros)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_sae_that_scales_its_input_is_undone_in_the_same_scale(lm_of, normalisation):
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    torch.manual_seed(1)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=96, normalize_activations=normalisation,
                                        apply_b_dec_to_input=True)).requires_grad_(False)
    sae.b_dec.data = torch.randn(64)
    x_TD = 5 * torch.randn(7, 64) + 2
    latents = torch.tensor([3, 50, 51])
    if normalisation == "layer_norm":  # sae-lens: centred, then over the standard deviation
        scale = (x_TD - x_TD.mean(-1, keepdim=True)).std(-1, keepdim=True) + 1e-5
        inner = (x_TD - x_TD.mean(-1, keepdim=True)) / scale
    elif normalisation == "constant_norm_rescale":
        scale = x_TD.norm(dim=-1, keepdim=True) / 8
        inner = x_TD / scale
    else:
        scale, inner = 1.0, x_TD
    values = ((inner - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    assert (values[:, latents] > 0).any()
    expected = x_TD - scale * (values[:, latents] @ sae.W_dec[latents])
    torch.testing.assert_close(without(sae, x_TD, latents), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 7.0])
def test_a_factor_multiplies_what_latents_add(factor):
    sae, x_TD, latents = topk_sae(64), torch.randn(20, 64, generator=torch.Generator().manual_seed(3)), [2, 5, 70]
    with torch.no_grad():
        value_TL = sae.encode(x_TD)
        added_TD = value_TL[:, latents] @ sae.W_dec[latents]
    assert added_TD.abs().sum() > 0
    found_TD = without(sae, x_TD, torch.tensor(latents), factor)
    torch.testing.assert_close(found_TD, x_TD + (factor - 1) * added_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_recomputation_without(lm_of, family):
    lm, sae, latents = lm_of(family), topk_sae(64), list(range(0, 96, 2))
    prompts = [ids_of(lm), ids_of(lm, "How many?")]
    with torch.no_grad(), zeroed(lm, sae, 0, latents):
        expected = []
        for ids in prompts:  # every step runs the whole text again
            for _ in range(12):
                ids = torch.cat([ids, lm.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            expected.append(ids[0, -12:].tolist())
        one = lm.model.generate(prompts[0], max_new_tokens=12, min_new_tokens=12, do_sample=False)
        # As a batch, the shorter prompt padded on the left.
        longest = prompts[0].shape[1]
        batch, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
        for row, ids in enumerate(prompts):
            batch[row, -ids.shape[1]:], mask[row, -ids.shape[1]:] = ids[0], 1
        both = lm.model.generate(batch, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert one[0, -12:].tolist() == expected[0]
    assert both[:, -12:].tolist() == expected
    plain = lm.model.generate(prompts[0], max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert plain[0, -12:].tolist() != expected[0]


def test_evaluation_sees_the_zeroed_model(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    example = Example("a", "math", TEXT, (), -1, "17", "12 + 5 = 17.")
    with zeroed(lm, sae, 0, range(96)):
        value = evaluate(lm, [example])["loglikelihood"].item()
    context = lm.tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False,
                                               add_generation_prompt=True)
    ids, start = ids_of(lm, context + example.solution), ids_of(lm, context).shape[1]
    log_p = by_hand(lm, sae, ids, range(96))[0].log_softmax(-1)
    expected = sum(log_p[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))
    assert value == pytest.approx(expected, abs=2e-3)
    assert evaluate(lm, [example])["loglikelihood"].item() != pytest.approx(value, abs=1e-2)


def test_tokens_above_the_norm_limit_are_left_alone(lm_of):
    lm, sae, seen = lm_of("llama"), topk_sae(64), []
    handle = decoder_layers(lm.model)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    logits_of(lm, ids_of(lm))
    norms = seen[0].norm(dim=-1)
    limit = norms.median().item()
    with zeroed(lm, sae, 0, range(96), norm_limit=limit):
        logits_of(lm, ids_of(lm))
    handle.remove()
    same = (seen[1] == seen[0]).all(-1)
    assert same[norms > limit].all() and not same[1:][norms[1:] <= limit].any()


def test_the_model_is_itself_again_after_an_error(lm_of):
    lm, sae = lm_of("llama"), topk_sae(64)
    plain = logits_of(lm, ids_of(lm))
    with pytest.raises(KeyboardInterrupt), zeroed(lm, sae, 0, range(96)):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(lm, ids_of(lm)), plain)


# --- lower layers run once ----------------------------------------------------------------------------------------

EXAMPLES = [Example(str(count), "math", f"A farmer has {count} sheep. How many legs?", (), -1, str(4 * count),
                    f"{count} times 4 is {4 * count}." * (1 + count // 7)) for count in range(3, 10)]
CHOICE = Example("c", "math", "How many legs does a sheep have? " * 9, ("four", "five"), 0, "four", "Count them.")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_scores_with_latents_zeroed_are_the_same(lm_of, family, layer):
    lm, sae, sets = lm_of(family), topk_sae(64), ([], range(0, 96, 2), [3, 5], range(96))

    def scores() -> list[list[float]]:
        found = []
        for latents in sets:
            with zeroed(lm, sae, layer, latents):
                found.append(evaluate(lm, [*EXAMPLES, CHOICE], batch=3)["loglikelihood"].tolist())
        return found

    whole = scores()
    with lower_layers_once(lm, layer):
        assert scores() == whole
    assert len({tuple(row) for row in whole}) == 4
    assert scores() == whole and all("forward" not in vars(one) for one in decoder_layers(lm.model))


def test_lower_layers_run_once_and_what_did_not_run_is_not_counted(lm_of):
    lm, once, twice, ran = lm_of("llama"), Work(), Work(), []
    handles = [one.mlp.register_forward_pre_hook(lambda module, args, place=place: ran.append(place))
               for place, one in enumerate(decoder_layers(lm.model))]
    evaluate(lm, EXAMPLES, batch=3, work=once)
    passes = ran.count(0)
    assert passes == ran.count(1) == 3
    ran.clear()
    with lower_layers_once(lm, 0, twice):
        for _ in range(2):
            evaluate(lm, EXAMPLES, batch=3, work=twice)
    for handle in handles:
        handle.remove()
    assert (ran.count(0), ran.count(1)) == (passes, 2 * passes)
    # The second time, one of the two layers ran.
    assert twice.layer_tokens == once.layer_tokens * 1.5 and twice.tokens == 2 * once.tokens


def test_passes_that_depend_on_more_than_their_tokens_run_in_full(lm_of):
    lm = lm_of("llama")
    ids_BP = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    mask_BP = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def logits(**inputs):
        with torch.no_grad():
            return lm.model(input_ids=ids_BP, **inputs).logits

    ways = ({"use_cache": False}, {"use_cache": False, "attention_mask": mask_BP}, {"use_cache": True}, {},
            {"use_cache": False, "position_ids": torch.arange(5, 9)[None]})
    plain = [logits(**inputs) for inputs in ways]
    assert not torch.equal(plain[0], plain[1])
    with lower_layers_once(lm, 0):
        for _ in range(2):
            assert all(torch.equal(logits(**inputs), one) for inputs, one in zip(ways, plain, strict=True))


def test_the_lower_layers_are_themselves_again_after_an_error(lm_of):
    lm = lm_of("llama")
    with pytest.raises(KeyboardInterrupt), lower_layers_once(lm, 1):
        raise KeyboardInterrupt
    assert all("forward" not in vars(one) for one in decoder_layers(lm.model))
    assert not lm.model._forward_pre_hooks
