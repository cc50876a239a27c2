"""What fine-tuning shifts, and what demonstrations foresee of it."""

from __future__ import annotations

import torch

from sts.data.groups import draws_of, other_domain_sets
from sts.data.prompts import make_group, solution_prompt
from sts.engine.extract import folded, model_paired_folds, paired_stats
from sts.engine.saes import SideBySide, identity_sae, random_code
from sts.run.stage import stage, steps

#: Groups of questions; latents are chosen on some of them and measured on the others.
FOLDS = 8
#: Seed of the random code's directions: the same in every run.
CODE_SEED = 20_000


def _codes(lm, reader) -> SideBySide:
    """The run's SAE ("sae"), a random code as sparse ("random") and the raw dimensions ("raw")."""
    return SideBySide({"sae": reader, "random": random_code(reader, CODE_SEED), "raw": identity_sae(lm)})


# --- what fine-tuning shifts --------------------------------------------------------------------------------------

def _tuned_shift(lm, tuned, reader, layer, prompts, masks, report, passes):
    codes = _codes(lm, reader)
    return codes.split(folded(model_paired_folds(lm, tuned, codes, layer, prompts, masks, min(FOLDS, len(prompts)),
                                                 report=report, **passes)))


@stage("tensors", version=2)
def sft_shift(lm, tuned, reader, layer, shift_groups, masks, report, passes):
    """Actual shift: stage `shift`'s questions in the untuned and the tuned model, in folds; every code."""
    prompts = [prompt for group in shift_groups for prompt in group.base]
    return _tuned_shift(lm, tuned, reader, layer, prompts, masks, report, passes)


@stage("tensors", version=2)
def sft_shift_solutions(lm, tuned, reader, layer, held_out, masks, report, passes):
    """The same on the worked solutions of held-out problems."""
    prompts = [solution_prompt(lm.tokenizer, example) for example in held_out]
    return _tuned_shift(lm, tuned, reader, layer, prompts, masks, report, passes)


# --- what demonstrations foresee ----------------------------------------------------------------------------------

@stage("tensors")
def shift_controls(lm, reader, layer, shift_groups, masks, report, passes):
    """Stage `shift` on a random code as sparse as the SAE, and on the residual stream's own dimensions."""
    codes = SideBySide({kind: code for kind, code in _codes(lm, reader).parts.items() if kind != "sae"})
    return codes.split(paired_stats(lm, codes, layer, shift_groups, masks, report=report, **passes).to_tensors())


def _shifts_behind(sets, questions, tokens, lm, reader, layer, masks, report, passes):
    """The same questions behind each set of demonstrations: kind/squared_difference_RL, one row a set; and the
    questions' own kind/base_fired_L and kind/base_square_sum_L, which are the same behind all."""
    codes, rows = _codes(lm, reader), []
    for demonstrations, told in steps(sets, report):
        group = make_group(lm.tokenizer, questions, demonstrations, tokens=tokens)
        stats = paired_stats(lm, codes, layer, [group], masks, report=told, **passes).to_tensors()
        rows.append(codes.split({name: stats[name] for name in (
            "squared_difference_L", "base_fired_L", "base_square_sum_L")}))
    return {name.replace("difference_L", "difference_RL"):
            torch.stack([row[name] for row in rows]) if name.endswith("difference_L") else rows[0][name]
            for name in rows[0]}


@stage("tensors", version=2)
def shift_by_draw(lm, reader, layer, train, masks, overlap_tokens, overlap_draws, shift_demonstrations, seed, report,
                  passes):
    """Squared change behind single sets of demonstrations, the same questions behind each; all codes."""
    sets, questions = draws_of(train, shift_demonstrations, overlap_draws, seed)
    return _shifts_behind(sets, questions, overlap_tokens, lm, reader, layer, masks, report, passes)


@stage("tensors", version=2)
def shift_by_other_domain(lm, reader, layer, train, questions, examples_set_aside, masks, overlap_tokens, overlap_draws,
                          shift_demonstrations, seed, report, passes):
    """Stage `shift_by_draw` with demonstrations from other domains before the same questions: a control."""
    _, own = draws_of(train, shift_demonstrations, overlap_draws, seed)
    sets = other_domain_sets(train, examples_set_aside or questions, shift_demonstrations, overlap_draws, seed)
    return _shifts_behind(sets, own, overlap_tokens, lm, reader, layer, masks, report, passes)


@stage("tensors", version=3)
def shift_by_demonstrations(lm, reader, layer, train, masks, overlap_tokens, overlap_demonstrations, overlap_draws,
                            seed, report, passes):
    """Squared change behind 1, 2, ... demonstrations, each set holding the smaller ones; kind/number -> draws x L."""
    draws, questions = draws_of(train, max(overlap_demonstrations), overlap_draws, seed)
    found = {}
    for number, told in steps(overlap_demonstrations, report):
        rows = _shifts_behind([own[:number] for own in draws], questions, overlap_tokens, lm, reader, layer, masks,
                              told, passes)
        found |= {f"{name.partition('/')[0]}/{number}": tensor for name, tensor in rows.items()
                  if name.endswith("squared_difference_RL")}
    return found
