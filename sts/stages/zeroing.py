"""The experiment that sets latents to zero (Figure 1b); which latents is chosen in measure/sets.py."""

from __future__ import annotations

import pandas
import torch

from sts.data.prompts import make_prompt, question_text, solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.residuals import Extractor
from sts.engine.zeroing import lower_layers_once, zeroed
from sts.measure.baselines import split_domains
from sts.measure.items import item_measures
from sts.measure.sets import latent_activity, sets_to_zero
from sts.run.stage import stage, steps

#: Length of the answers that are written with latents zeroed.
ANSWER_TOKENS = 72
#: Problems whose tokens say what norm makes a token a sink.
NORM_PROBLEMS = 8


def _chosen(sft_shift, sft_shift_solutions, reader, tuned, counts, draws, seed):
    """Firing rates and total energy on the solutions, and every set to zero."""
    norms_L = reader.W_dec.detach().double().norm(dim=1).cpu()
    rate_L, energy_L = latent_activity(split_domains(sft_shift_solutions)["sae"], norms_L, tuned=tuned)
    change_L = split_domains(sft_shift)["sae"]["squared_difference_L"]
    return rate_L, energy_L, sets_to_zero(change_L, energy_L, counts, draws, seed, rate_L)


def _kept(lm, layer, held_out, masks, passes):
    """Which tokens are left alone: first ones, and those above the norm that makes a sink."""
    prompts = [solution_prompt(lm.tokenizer, example) for example in held_out[:NORM_PROBLEMS]]
    limit, = Extractor(lm, layer, **passes).sink_norms(
        [prompt.ids for prompt in prompts], [prompt.question for prompt in prompts], masks.outlier_norm)
    return {"drop_first_positions": masks.drop_first_positions, "norm_limit": limit}


@stage("parquet", version=4)
def ablation(lm, tuned, reader, layer, held_out, masks, sft_shift, sft_shift_solutions, ablation_model,
             ablation_examples, ablation_latents, ablation_draws, eval_batch, seed, report, passes):
    """Bits per character of held-out training-domain solutions with latents zeroed, most shifted and others.

    One row per set of latents and problem: kind (of `ZeroSet`), latents (number zeroed), draw, rate (mean firing rate
    of the set), energy (sum of the set's, per token), share (of all latents' energy), example_id, bits, accuracy where
    it has options. A matched set that failed to match has one row, without example_id and bits.
    """
    model, work = tuned if ablation_model == "tuned" else lm, passes["work"]
    kept = _kept(model, layer, held_out, masks, passes)
    rate_L, energy_L, chosen = _chosen(sft_shift, sft_shift_solutions, reader, ablation_model == "tuned",
                                       ablation_latents, ablation_draws, seed)
    total, frames = energy_L.sum().item(), []
    with lower_layers_once(model, layer, work):
        for own, _ in steps(chosen, report):
            items = pandas.DataFrame(index=[0])
            if own.usable:
                with zeroed(model, reader, layer, own.latents, **kept):
                    items = item_measures(evaluate(model, held_out[:ablation_examples], batch=eval_batch,
                                                   work=work)).reset_index()
            frames.append(items.assign(kind=own.kind, latents=own.count, draw=own.draw, energy=own.energy,
                                       rate=rate_L[own.latents].mean().item() if own.count else 0.0,
                                       share=own.energy / total if total else 0.0))
    return pandas.concat(frames, ignore_index=True)


@stage("json", version=4)
def ablated_answers(lm, tuned, reader, layer, held_out, masks, sft_shift, sft_shift_solutions, ablation_model, top_n,
                    seed, passes):
    """The first held-out problem answered (greedily) with nothing zeroed, the most shifted, and as many others."""
    model, example, answers = tuned if ablation_model == "tuned" else lm, held_out[0], []
    kept, tokenizer = _kept(model, layer, held_out, masks, passes), model.tokenizer
    ids = torch.tensor([make_prompt(tokenizer, question_text(example)).ids], device=model.device)
    *_, chosen = _chosen(sft_shift, sft_shift_solutions, reader, ablation_model == "tuned", [top_n], 1, seed)
    for own in (one for one in chosen if one.usable):
        with torch.inference_mode(), zeroed(model, reader, layer, own.latents, **kept):
            text = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS,
                                        do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers.append({"zeroed": own.kind, "latents": own.count,
                        "answer": tokenizer.decode(text[0, ids.shape[1]:], skip_special_tokens=True)})
    return {"question": example.question, "answer": example.answer, "answers": answers, "tokens": ANSWER_TOKENS}
