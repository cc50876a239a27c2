"""What rivals ask of a model, on tiny random models, against plain passes and finite differences."""

import pytest
import torch
from helpers import topk_sae
from safetensors.torch import load_file

from sts.data.prompts import solution_prompt
from sts.data.sources import Example
from sts.engine.finetune import FineTuning, fine_tune
from sts.engine.models import load_model
from sts.engine.rivals import answer_states, first_weights, gradient
from sts.engine.work import Work
from sts.errors import StsError

EXAMPLES = [Example(f"e{place}", "arithmetic", f"What is {place} and {place}?", (), -1, str(2 * place),
                    "Add them up. " * (place + 1) + f"It is {2 * place}.") for place in range(5)]


def prompts_of(lm, examples=EXAMPLES):
    return [solution_prompt(lm.tokenizer, example) for example in examples]


def states(lm, ids, layer=0):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("most", [None, 4])
def test_answer_states_are_means_over_the_answers_tokens(lm_of, family, most):
    lm = lm_of(family)
    sae, prompts = topk_sae(lm.model.config.hidden_size), prompts_of(lm)
    found = answer_states(lm, sae, 0, prompts, most=most, outlier_norm=0, tokens_per_batch=64)
    for place, prompt in enumerate(prompts):
        whole_TD = states(lm, prompt.ids)[slice(*prompt.question)]
        own_TD = whole_TD[:most]
        for name, expected in (("raw_ED", own_TD.mean(0)), ("sae_EL", sae.encode(own_TD).mean(0)),
                               ("last_ED", whole_TD[-1])):
            torch.testing.assert_close(found[name][place], expected, rtol=1e-4, atol=1e-5)


def test_sinks_are_left_out_of_the_mean(lm_of):
    lm = lm_of("llama")
    sae, prompts = topk_sae(lm.model.config.hidden_size), prompts_of(lm)
    norms = torch.cat([states(lm, prompt.ids)[slice(*prompt.question)] for prompt in prompts]).norm(dim=-1)
    found = answer_states(lm, sae, 0, prompts, outlier_norm=1.0)["raw_ED"]
    for place, prompt in enumerate(prompts):
        own_TD = states(lm, prompt.ids)[slice(*prompt.question)]
        kept_TD = own_TD[own_TD.norm(dim=-1) <= norms.median()]
        torch.testing.assert_close(found[place], kept_TD.mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(StsError, match="no token but attention sinks"):
        answer_states(lm, sae, 0, prompts, outlier_norm=1e-6)


@pytest.fixture(params=[("llama", 4), ("gemma3", 4), ("llama", 0)], ids=str)
def begun(request, tiny_models):
    family, rank = request.param
    lm = load_model(str(tiny_models[family]), dtype="float32")
    weights = first_weights(lm, rank, 8, 3)
    lm.model.double()  # so that differences can be small
    lm.model.get_input_embeddings().padding_idx = None  # torch leaves its row out of the gradient, also inside a text
    return lm, weights, rank


def mean_loss(lm, prompts):
    """Mean over prompts of the nats per token of their answers, by plain passes of one prompt each."""
    values = []
    for prompt in prompts:
        with torch.no_grad():
            log_p = lm.model(torch.tensor([prompt.ids])).logits[0].double().log_softmax(-1)
        values.append(-sum(log_p[at - 1, prompt.ids[at]].item() for at in range(*prompt.question))
                      / (prompt.question[1] - prompt.question[0]))
    return sum(values) / len(values)


def moved(weights, step_G):
    """Add a flat step to the weights, in place."""
    at = 0
    with torch.no_grad():
        for one in weights:
            one += step_G[at:at + one.numel()].view_as(one)
            at += one.numel()
    assert at == len(step_G)


def test_gradients_are_finite_differences(begun):
    lm, weights, rank = begun
    prompts, work = prompts_of(lm), Work()
    gradient_G = gradient(lm, weights, prompts, micro_batch=2, work=work)
    assert not rank or not any(one.any() for one in weights)  # B is zero where fine-tuning begins
    assert work.tokens == sum(len(prompt.ids) for prompt in prompts) and work.passes == 2 * work.padded_tokens
    direction_G = torch.randn(len(gradient_G), generator=torch.Generator().manual_seed(0))
    direction_G = gradient_G + direction_G * gradient_G.norm() / direction_G.norm()  # else hardly anything changes
    step_G = direction_G.double() * 1e-4 / gradient_G.norm()
    moved(weights, step_G)
    ahead = mean_loss(lm, prompts)
    moved(weights, -2 * step_G)
    slope = (ahead - mean_loss(lm, prompts)) / 2
    moved(weights, step_G)
    assert slope == pytest.approx((gradient_G.double() @ step_G).item(), rel=1e-3)


def test_a_small_step_on_one_set_changes_another_by_minus_the_inner_product(begun):
    lm, weights, _ = begun
    prompts = prompts_of(lm)
    training, domain = (gradient(lm, weights, own, micro_batch=4, work=Work()) for own in (prompts[:3], prompts[3:]))
    before, rate = mean_loss(lm, prompts[3:]), 2e-4 / training.norm()
    moved(weights, -rate * training)
    change = mean_loss(lm, prompts[3:]) - before
    assert change == pytest.approx(-(rate * training @ domain).item(), rel=1e-2) and change < 0


def test_adapters_are_those_that_fine_tuning_starts_from(tiny_models, tmp_path):
    """With a rate of next to nothing the saved A is the first one."""
    first = load_model(str(tiny_models["llama"]), dtype="float32")
    first_weights(first, 4, 8, 3)
    tuned = load_model(str(tiny_models["llama"]), dtype="float32")
    fine_tune(tuned, EXAMPLES, [], FineTuning(1, 1e-30, 4, 4, 512, 4, 8, 3), tmp_path)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = {name: one for name, one in first.model.named_parameters() if "lora_A" in name}
    assert len(own) == len([name for name in saved if "lora_A" in name]) > 0
    for name, one in own.items():
        stored, = [two for other, two in saved.items() if name.replace(".default", "") in other]
        torch.testing.assert_close(one.data, stored)
