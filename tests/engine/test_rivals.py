"""What rivals ask of a model, on tiny random models, against plain passes and finite differences."""

import pytest
import torch
from helpers import topk_sae

from sts.data.prompts import solution_prompt
from sts.data.sources import Example
from sts.engine.rivals import answer_states
from sts.engine.saes import SideBySide, identity_sae

EXAMPLES = [Example(f"e{place}", "arithmetic", f"What is {place} and {place}?", (), -1, str(2 * place),
                    "Add them up. " * (place + 1) + f"It is {2 * place}.") for place in range(5)]


def prompts_of(lm, examples=EXAMPLES):
    return [solution_prompt(lm.tokenizer, example) for example in examples]


def states(lm, ids, layer=0):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("most", [0, 4])
def test_answer_states_are_means_over_the_answers_tokens(lm_of, family, most):
    lm = lm_of(family)
    sae = topk_sae(lm.model.config.hidden_size)
    code, prompts = SideBySide({"raw": identity_sae(lm), "sae": sae}), prompts_of(lm)
    means_EL, last_ED = answer_states(lm, code, 0, prompts, most=most, outlier_norm=0, tokens_per_batch=64)
    for place, prompt in enumerate(prompts):
        first, last = prompt.question
        own_TD = states(lm, prompt.ids)[first:last][:most or None]
        expected = torch.cat([own_TD.mean(0), sae.encode(own_TD).mean(0)])
        torch.testing.assert_close(means_EL[place], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_ED[place], own_TD[-1], rtol=1e-4, atol=1e-5)
