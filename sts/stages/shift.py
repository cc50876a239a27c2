"""What fine-tuning shifts, what demonstrations foresee of it, and what setting latents to zero costs (Figure 1b)."""

from __future__ import annotations

import pandas

from sts.data.groups import draws_of, other_domain_sets
from sts.data.prompts import PromptGroup, make_prompt, question_text, solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.extract import paired_stats, shift_by_training, shifts_behind, three_codes
from sts.engine.generation import greedy_answer
from sts.engine.residuals import Extractor
from sts.engine.saes import SideBySide
from sts.engine.zeroing import lower_layers_once, zeroed
from sts.measure.baselines import split_domains
from sts.measure.items import item_measures
from sts.measure.sets import latent_activity, sets_to_zero
from sts.run.stage import stage, steps

#: Length of the answers that are written with latents zeroed.
ANSWER_TOKENS = 72


@stage("tensors", version=2)
def sft_shift(lm, tuned, reader, layer, shift_groups, masks, report, passes):
    """Actual shift: stage `shift`'s questions in the untuned and the tuned model, in folds; every code."""
    return shift_by_training(lm, tuned, reader, layer, shift_groups, masks, report=report, **passes)


@stage("tensors", version=2)
def sft_shift_solutions(lm, tuned, reader, layer, held_out, masks, report, passes):
    """The same on the worked solutions of held-out problems."""
    prompts = tuple(solution_prompt(lm.tokenizer, example) for example in held_out)
    return sft_shift(lm, tuned, reader, layer, [PromptGroup(prompts, ())], masks, report, passes)


@stage("tensors")
def shift_controls(lm, reader, layer, shift_groups, masks, report, passes):
    """Stage `shift` on a random code as sparse as the SAE, and on the residual stream's own dimensions."""
    codes = SideBySide({kind: code for kind, code in three_codes(lm, reader).parts.items() if kind != "sae"})
    return codes.split(paired_stats(lm, codes, layer, shift_groups, masks, report=report, **passes).to_tensors())


@stage("tensors", version=2)
def shift_by_draw(lm, reader, layer, train, masks, overlap_tokens, overlap_draws, shift_demonstrations, seed, report,
                  passes):
    """Squared change behind single sets of demonstrations, the same questions behind each; all codes."""
    sets, questions = draws_of(train, shift_demonstrations, overlap_draws, seed)
    return shifts_behind(sets, questions, overlap_tokens, lm, reader, layer, masks, report=report, **passes)


@stage("tensors", version=2)
def shift_by_other_domain(lm, reader, layer, train, questions, examples_set_aside, masks, overlap_tokens, overlap_draws,
                          shift_demonstrations, seed, report, passes):
    """Stage `shift_by_draw` with demonstrations from other domains before the same questions: a control."""
    _, own = draws_of(train, shift_demonstrations, overlap_draws, seed)
    sets = other_domain_sets(train, examples_set_aside or questions, shift_demonstrations, overlap_draws, seed)
    return shifts_behind(sets, own, overlap_tokens, lm, reader, layer, masks, report=report, **passes)


@stage("tensors", version=3)
def shift_by_demonstrations(lm, reader, layer, train, masks, overlap_tokens, overlap_demonstrations, overlap_draws,
                            seed, report, passes):
    """Squared change behind 1, 2, ... demonstrations, each set holding the smaller ones; kind/number -> draws x L."""
    draws, questions = draws_of(train, max(overlap_demonstrations), overlap_draws, seed)
    sets = [own[:number] for number in overlap_demonstrations for own in draws]
    rows = shifts_behind(sets, questions, overlap_tokens, lm, reader, layer, masks, report=report, **passes)
    return {f"{name.partition('/')[0]}/{number}": part.clone() for name, tensor in rows.items() if name.endswith("_RL")
            for number, part in zip(overlap_demonstrations, tensor.split(overlap_draws), strict=True)}


def _zeroing(lm, tuned, reader, layer, held_out, masks, sft_shift, sft_shift_solutions, which, counts, draws, seed,
             passes):
    """The model, which of its tokens are left alone (first ones, and those above the norm that makes a sink), firing
    rates and energies on the solutions, and every set to zero."""
    model = tuned if which == "tuned" else lm
    prompts = [solution_prompt(lm.tokenizer, example) for example in held_out]
    limit, = Extractor(model, layer, **passes).sink_norms(prompts, masks.outlier_norm)
    norms_L = reader.W_dec.detach().double().norm(dim=1).cpu()
    rate_L, energy_L = latent_activity(split_domains(sft_shift_solutions)["sae"], norms_L, tuned=which == "tuned")
    change_L = split_domains(sft_shift)["sae"]["squared_difference_L"]
    return (model, {"drop_first_positions": masks.drop_first_positions, "norm_limit": limit}, rate_L, energy_L,
            sets_to_zero(change_L, energy_L, counts, draws, seed, rate_L))


@stage("parquet", version=4)
def ablation(lm, tuned, reader, layer, held_out, masks, sft_shift, sft_shift_solutions, ablation_model,
             ablation_examples, ablation_latents, ablation_draws, eval_batch, seed, report, passes):
    """Bits per character of held-out training-domain solutions with latents zeroed, most shifted and others.

    One row per set of latents and problem: kind (of `ZeroSet`), latents (their number), draw, rate (mean firing rate),
    energy (their sum, per token), share (of all energy), example_id, bits, accuracy where it has options. A matched set
    that failed to match has one row, without example_id and bits.
    """
    model, kept, rate_L, energy_L, chosen = _zeroing(lm, tuned, reader, layer, held_out, masks, sft_shift,
                                                     sft_shift_solutions, ablation_model, ablation_latents,
                                                     ablation_draws, seed, passes)
    work, total, frames = passes["work"], energy_L.sum().item(), []
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
    model, kept, *_, chosen = _zeroing(lm, tuned, reader, layer, held_out, masks, sft_shift, sft_shift_solutions,
                                       ablation_model, [top_n], 1, seed, passes)
    example, answers = held_out[0], []
    ids = make_prompt(model.tokenizer, question_text(example)).ids
    for own in (one for one in chosen if one.usable):
        with zeroed(model, reader, layer, own.latents, **kept):
            answers.append({"zeroed": own.kind, "latents": own.count,
                            "answer": greedy_answer(model, ids, ANSWER_TOKENS)})
    return {"question": example.question, "answer": example.answer, "answers": answers, "tokens": ANSWER_TOKENS}
