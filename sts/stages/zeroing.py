"""Stages of the experiment that sets latents to zero (Figure 1b); which latents is chosen in zero_sets.py."""

from __future__ import annotations

from dataclasses import dataclass

import pandas
import torch

from sts.data.prompts import make_prompt, question_text
from sts.engine.evaluate import evaluate, item_measures
from sts.engine.extract import norm_threshold
from sts.engine.finetune import load_tuned
from sts.engine.lower_layers import lower_layers_once
from sts.engine.models import LanguageModel
from sts.engine.residuals import Extractor
from sts.engine.zeroing import zeroed
from sts.measure.sets import ZeroSet, sets_to_zero
from sts.run.run import OpenRun, stage
from sts.stages.forecast import MASKS
from sts.stages.sae import MODEL, SAE
from sts.stages.shift import of_kind, solution_prompts

#: Length of the answers that are written with latents zeroed.
ANSWER_TOKENS = 72
NEEDS = ("sft_shift", "sft_shift_solutions", "sft")


@dataclass(frozen=True)
class Activity:
    """What each latent does in the model it is zeroed in, on the solutions' tokens.

    Attributes:
        rate_L: share of tokens on which it fires.
        energy_L: mean over tokens of the squared length of what it adds to the residual stream.
    """

    rate_L: torch.Tensor
    energy_L: torch.Tensor


def activity(run: OpenRun) -> Activity:
    """Activity of the latents on held-out solutions, in the model of setting `ablation_model`."""
    stats = of_kind(run.get("sft_shift_solutions"), "sae")
    side = "icl" if run.settings.ablation_model == "tuned" else "base"
    energy_L = stats[f"{side}_square_sum_L"] / stats["tokens"]
    if not run.settings.fold_norms:  # else they are one, and pages of recorded results need no SAE
        energy_L = energy_L * run.sae().W_dec.detach().double().norm(dim=1).cpu().square()
    return Activity(stats[f"{side}_fired_L"] / stats["tokens"], energy_L)


def change_by_latent(run: OpenRun) -> torch.Tensor:
    """Squared change by fine-tuning on the training questions, which chooses the most shifted latents."""
    return of_kind(run.get("sft_shift"), "sae")["squared_difference_L"]


def chosen_sets(run: OpenRun, counts: list[int], draws: int) -> list[ZeroSet]:
    """`sets_to_zero` of a run."""
    active = activity(run)
    return sets_to_zero(change_by_latent(run), active.energy_L, counts, draws, run.settings.seed, active.rate_L)


def _to_ablate(run: OpenRun, report) -> tuple[LanguageModel, float]:
    """The model to zero latents in, and the norm above which its tokens are sinks and left alone."""
    settings = run.settings
    lm = load_tuned(run.load_model(), run.get("sft")) if settings.ablation_model == "tuned" else run.lm
    prompts = solution_prompts(run)[:8]
    limit = norm_threshold(Extractor(lm, settings.layer, settings.tokens_per_batch, report.work),
                           [prompt.ids for prompt in prompts], [prompt.question for prompt in prompts],
                           settings.outlier_norm)
    return lm, limit


@stage("parquet", version=4, uses=(*MODEL, *SAE, *MASKS, "ablation_model", "ablation_examples", "ablation_latents",
                                   "ablation_draws", "eval_batch", "seed"), needs=NEEDS,
       inputs=("model", "sae", "sft_held_out"))
def ablation(run: OpenRun, report) -> pandas.DataFrame:
    """Bits per character of held-out training-domain solutions with latents zeroed, most shifted and others.

    One row per set of latents and problem: kind (of `ZeroSet`), latents (number
    zeroed), draw, rate (mean firing rate of the set), energy (sum of the set's, per token), share (of all latents'
    energy), example_id, bits, accuracy where it has options. A matched set that failed to match has one row, without
    example_id and bits.
    """
    settings = run.settings
    examples = run.sft_examples("held_out")[:settings.ablation_examples]
    lm, limit = _to_ablate(run, report)
    active = activity(run)
    total = active.energy_L.sum().item()
    chosen, frames = chosen_sets(run, settings.ablation_latents, settings.ablation_draws), []
    with lower_layers_once(lm, settings.layer, report.work):
        for done, own in enumerate(chosen, 1):
            items = pandas.DataFrame(index=[0])
            if own.usable:
                with zeroed(lm, run.sae(), settings.layer, own.latents, norm_limit=limit,
                            drop_first_positions=settings.drop_first_positions):
                    items = item_measures(evaluate(lm, examples, batch=settings.eval_batch,
                                                   work=report.work)).reset_index()
            rate = active.rate_L[own.latents].mean().item() if own.count else 0.0
            frames.append(items.assign(kind=own.kind, latents=own.count, draw=own.draw, rate=rate, energy=own.energy,
                                       share=own.energy / total if total else 0.0))
            report(done / len(chosen))
    return pandas.concat(frames, ignore_index=True)


@stage("json", version=4, uses=(*MODEL, *SAE, *MASKS, "ablation_model", "top_n", "seed"), needs=NEEDS,
       inputs=("model", "sae", "sft_held_out"))
def ablated_answers(run: OpenRun, report) -> dict:
    """The first held-out problem answered (greedily) with nothing zeroed, the most shifted, and as many others."""
    settings, example = run.settings, run.sft_examples("held_out")[0]
    lm, limit = _to_ablate(run, report)
    ids = torch.tensor([make_prompt(lm.tokenizer, question_text(example)).ids], device=lm.device)
    answers = []
    for own in (one for one in chosen_sets(run, [settings.top_n], 1) if one.usable):
        with torch.inference_mode(), zeroed(lm, run.sae(), settings.layer, own.latents, norm_limit=limit,
                                            drop_first_positions=settings.drop_first_positions):
            text = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS,
                                     do_sample=False, pad_token_id=lm.tokenizer.pad_token_id)
        answers.append({"zeroed": own.kind, "latents": own.count,
                        "answer": lm.tokenizer.decode(text[0, ids.shape[1]:], skip_special_tokens=True)})
    return {"question": example.question, "answer": example.answer, "answers": answers, "tokens": ANSWER_TOKENS}
