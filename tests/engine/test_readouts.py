"""Read-outs against passes by hand, finite differences and a plain training loop."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import topk_sae

from sts.data.load import load_examples
from sts.data.prompts import solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.finetune import FineTuning, fine_tune
from sts.engine.models import decoder_layers, load_model
from sts.engine.readouts import ReadOuts, attached
from sts.engine.zeroing import lower_layers_once
from sts.errors import StsError

TEXT = "A farmer has 12 sheep and buys 5 more. How many sheep does the farmer have now?"
LATENTS = torch.arange(0, 96, 2)
OPEN = {0: math.inf, 1: math.inf}
EXAMPLES = load_examples("gsm_symbolic", limit=8, seed=3)
SETTINGS = FineTuning(epochs=4, lr=1e-2, batch=4, micro_batch=2, max_length=512, lora_rank=8, lora_alpha=1, seed=0)


def ids_of(lm, text=TEXT):
    return torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])


def logits_of(lm, ids, **inputs):
    with torch.no_grad():
        return lm.model(ids, **inputs).logits


def read_outs(layers=(0,), latents=LATENTS, scale=0.0, seed=0):
    """Read-outs with random weights."""
    made = ReadOuts({layer: topk_sae(64, seed=layer) for layer in layers}, dict.fromkeys(layers, latents))
    torch.manual_seed(seed)
    for weight in made.weights.values():
        weight.data = scale * torch.randn_like(weight)
    return made


def by_hand(lm, made, ids, first=1):
    """The layers of the read-outs run with what they add written out, token by token and latent by latent."""
    def hook_of(layer):
        sae, weight, latents = made.saes[layer], made.weights[str(layer)], made.latents[layer].tolist()

        def hook(module, args, output):
            changed = output.clone()
            for position in range(first, ids.shape[1]):
                x = output[0, position]
                values = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
                strongest = sorted(range(len(values)), key=lambda j: -values[j].item())[:sae.cfg.k]
                for place, latent in enumerate(latents):
                    if latent in strongest:
                        changed[0, position] += values[latent].clamp(min=0) * weight[:, place]
            return changed
        return hook

    handles = [decoder_layers(lm.model)[layer].register_forward_hook(hook_of(layer)) for layer in made.saes]
    try:
        return logits_of(lm, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_untrained_read_outs_change_no_logit(lm_of, family):
    lm = lm_of(family)
    plain = logits_of(lm, ids_of(lm))
    with attached(lm, read_outs((0, 1)), OPEN, drop_first_positions=0):
        assert torch.equal(logits_of(lm, ids_of(lm)), plain)


def test_nor_do_they_in_half_precision(tiny_models):
    lm = load_model(str(tiny_models["llama"]), dtype="bfloat16")
    plain = logits_of(lm, ids_of(lm))
    with attached(lm, read_outs((0, 1)), OPEN):
        assert torch.equal(logits_of(lm, ids_of(lm)), plain)
    with attached(lm, read_outs((0, 1), scale=1.0), OPEN):
        assert not torch.equal(logits_of(lm, ids_of(lm)), plain)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_read_outs_add_what_their_latents_are_times_their_weights(lm_of, layers):
    lm, made = lm_of("llama"), read_outs(layers, scale=0.5)
    plain = logits_of(lm, ids_of(lm))
    with attached(lm, made, OPEN):
        changed = logits_of(lm, ids_of(lm))
    # With two layers, the upper SAE reads what the lower read-out has changed.
    torch.testing.assert_close(changed, by_hand(lm, made, ids_of(lm)), rtol=1e-4, atol=1e-4)
    assert (changed - plain).abs().max() > 1e-2
    torch.testing.assert_close(changed[:, 0], plain[:, 0])  # the first token is left alone
    assert torch.equal(logits_of(lm, ids_of(lm)), plain) and not hasattr(lm.model, "read_outs")


def test_sinks_are_left_alone(lm_of):
    lm, seen = lm_of("llama"), []
    handle = decoder_layers(lm.model)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    logits_of(lm, ids_of(lm))
    norms = seen[0].norm(dim=-1)
    limit = norms.median().item()
    with attached(lm, read_outs(latents=torch.arange(96), scale=1.0), {0: limit}):
        logits_of(lm, ids_of(lm))
    handle.remove()
    same = (seen[1] == seen[0]).all(-1)
    assert same[norms > limit].all() and not same[1:][norms[1:] <= limit].any()


def test_evaluation_sees_read_outs(lm_of):
    lm, made = lm_of("llama"), read_outs(scale=0.5)
    with attached(lm, made, OPEN):
        value = evaluate(lm, EXAMPLES[:1])["loglikelihood"].item()
    ids, (first, last) = solution_prompt(lm.tokenizer, EXAMPLES[0])
    log_p = by_hand(lm, made, torch.tensor([ids]))[0].log_softmax(-1)
    assert value == pytest.approx(sum(log_p[at - 1, ids[at]].item() for at in range(first, last)), abs=2e-2)


def test_gradients_are_finite_differences(tiny_models):
    lm, made = load_model(str(tiny_models["llama"]), dtype="float32"), read_outs((0, 1), scale=0.1)
    ids = ids_of(lm)

    def loss():
        return -lm.model(ids).logits[0, :-1].log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]].mean()

    with attached(lm, made, OPEN):
        loss().backward()
        for weight in made.weights.values():
            direction = torch.randn_like(weight)
            direction /= direction.norm()
            start, found = weight.data.clone(), []
            for sign in (1, -1):
                weight.data = start + sign * 1e-2 * direction
                with torch.no_grad():
                    found.append(loss().item())
            weight.data = start
            assert (found[0] - found[1]) / 2e-2 == pytest.approx((weight.grad * direction).sum().item(), rel=0.05,
                                                                  abs=2e-5)
    assert all(one.grad is None for one in lm.model.parameters())


def solution_terms(lm, example):
    """Loss of every token of a problem's turn behind the prompt."""
    ids, (first, _) = solution_prompt(lm.tokenizer, example)
    log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -log_p[range(first - 1, len(ids) - 1), ids[first:]]


def trained(tiny_models, folder, *, once=False, **changed):
    """Read-outs of both layers after training, the model, and the log."""
    lm, made = load_model(str(tiny_models["llama"]), dtype="float32"), read_outs((0, 1))
    with attached(lm, made, OPEN):
        if once:
            with lower_layers_once(lm, 0):
                log = fine_tune(lm, EXAMPLES[:4], [], replace(SETTINGS, **changed), folder, module=made)
        else:
            log = fine_tune(lm, EXAMPLES[:4], [], replace(SETTINGS, **changed), folder, module=made)
    return made, lm, log


def test_training_takes_the_steps_of_a_plain_loop_and_leaves_the_model_as_it_was(tiny_models, tmp_path):
    made, lm, log = trained(tiny_models, tmp_path)
    other, fresh = read_outs((0, 1)), load_model(str(tiny_models["llama"]), dtype="float32")
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    with attached(fresh, other, OPEN):
        for step in range(4):  # one step an epoch, the first of which warms up
            optimizer.param_groups[0]["lr"] = 1e-2 * ((1 + math.cos(math.pi * (step - 1) / 3)) / 2 if step else 0)
            optimizer.zero_grad()
            torch.cat([solution_terms(fresh, example) for example in EXAMPLES[:4]]).mean().backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
    for layer, weight in made.weights.items():
        assert weight.abs().max() > 1e-3
        moved = (weight - other.weights[layer]).abs()
        assert (moved > 1e-3).float().mean() < 0.02  # Adam's step from a gradient near zero may go either way
    assert log["trained_parameters"] == 2 * 64 * 48 and log["curve"][-1]["loss"] < log["curve"][0]["loss"]
    assert log["held_out_before"] is log["held_out_after"] is None
    weights = dict(lm.model.named_parameters())
    assert all(torch.equal(one, weights[name]) for name, one in fresh.model.named_parameters())
    assert "forward" not in vars(lm.model) and not lm.model.training and not list(tmp_path.glob("checkpoints/*/*"))
    assert torch.equal(logits_of(lm, ids_of(lm)), logits_of(fresh, ids_of(lm)))


def test_training_with_the_lower_layers_run_once_is_the_same(tiny_models, tmp_path):
    plain, _, log = trained(tiny_models, tmp_path / "plain", batch=2)
    once, _, other = trained(tiny_models, tmp_path / "once", batch=2, once=True)
    assert [row["loss"] for row in log["curve"]] == [row["loss"] for row in other["curve"]]
    assert all(torch.equal(weight, once.weights[layer]) for layer, weight in plain.weights.items())


@pytest.mark.parametrize(("layers", "latents", "said"), [
    ((0, 1), LATENTS, "no SAE of layer 1"), ((0,), torch.tensor([3, 96]), "SAE of layer 0 has no latent 96"),
    ((0,), torch.tensor([-1]), "layer 0 has no latent -1")])
def test_what_cannot_be_read_is_said(layers, latents, said):
    with pytest.raises(StsError, match=said):
        ReadOuts({0: topk_sae(64)}, dict.fromkeys(layers, latents))


def test_a_layer_that_the_model_does_not_have_is_said_and_nothing_is_left_behind(lm_of):
    lm = lm_of("llama")
    hooks = dict(decoder_layers(lm.model)[0]._forward_hooks)  # transformers' own, where another test asked for states
    with pytest.raises(StsError, match="Layer 7 .* has layers 0 to 1"), attached(
            lm, read_outs((0, 7)), {0: math.inf, 7: math.inf}):
        pass
    assert not hasattr(lm.model, "read_outs") and dict(decoder_layers(lm.model)[0]._forward_hooks) == hooks
