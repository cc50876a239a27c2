"""Rivals of the score: what they read of the training answers, of the domains' right answers, and of the model."""

from __future__ import annotations

from dataclasses import replace

import torch

from sts.data.prompts import make_prompt, question_text, solution_prompt
from sts.engine.generation import open_engine, own_answers
from sts.engine.models import decoder_layers
from sts.engine.rivals import answer_states
from sts.engine.saes import SideBySide, identity_sae
from sts.errors import StsError
from sts.run.stage import stage, steps


def _answered(tokenizer, example, **changes):
    """The prompt of a question with its answer, as an open one with its options written out, so that nothing is put in
    front of a worked solution, or of the right option's text."""
    return solution_prompt(tokenizer, replace(example, question=question_text(example), options=(), answer_index=-1,
                                              **changes))


def _codes(lm, reader):
    return SideBySide({"raw": identity_sae(lm), "sae": reader})


@stage("json")
def greedy_answers(fresh_lm, train, rival_problems, rival_tokens, eval_batch, work):
    """The untuned model's own greedy answers to the first training problems: example_id and answer."""
    lm, asked = fresh_lm(), train[:rival_problems]
    found = own_answers(open_engine(lm, batch=eval_batch), asked, rival_tokens)
    work.of_layers = layers = len(decoder_layers(lm.model))
    for example, (text, _) in zip(asked, found, strict=True):
        ids = make_prompt(lm.tokenizer, question_text(example)).ids
        work.add(tokens := len(ids) + len(lm.tokenizer(text)["input_ids"]), tokens, layers)
    return [{"example_id": one.example_id, "answer": text} for one, (text, _) in zip(asked, found, strict=True)]


@stage("tensors")
def training_answer_states(lm, reader, layer, train, greedy_answers, rival_tokens, masks, passes):
    """Of each problem that the model answered itself: training_raw_ED, training_sae_EL, own_raw_ED, own_sae_EL, mean
    over the answer's first `rival_tokens` tokens (of both answers alike, as one is cut there), and place_E, the
    problem's place in the training set; last_D, mean residual at the last token of whole training answers."""
    places = [place for place, row in enumerate(greedy_answers) if row["answer"]]
    if not places:
        raise StsError("The untuned model answers no training problem with a word; raise rival_tokens.")
    problems, found = [train[place] for place in places], {"place_E": torch.tensor(places)}
    sides = {"training": [_answered(lm.tokenizer, one) for one in problems],
             "own": [_answered(lm.tokenizer, one, solution=greedy_answers[place]["answer"])
                     for one, place in zip(problems, places, strict=True)]}
    codes, passes = _codes(lm, reader), passes | {"outlier_norm": masks.outlier_norm}
    for side, prompts in sides.items():
        means_EL = answer_states(lm, codes, layer, prompts, most=rival_tokens, **passes)[0]
        parts = means_EL.split(codes.widths, dim=1)
        found |= {f"{side}_raw_ED": parts[0].clone(), f"{side}_sae_EL": parts[1].clone()}
    found["last_D"] = answer_states(lm, identity_sae(lm), layer, sides["training"], **passes)[1].mean(0)
    return found


@stage("tensors")
def domain_answer_states(lm, reader, layer, questions, rival_questions, masks, report, passes):
    """Of each domain's first questions, behind which stands the worked solution or the right option's text:
    domain/raw_QD, mean over each answer's tokens, domain/sae_L, mean over questions too, and domain/last_D."""
    codes, found = _codes(lm, reader), {}
    for (domain, group), _ in steps(questions.items(), report):
        prompts = [_answered(lm.tokenizer, one) for one in group[:rival_questions]]
        means_QL, last_QD = answer_states(lm, codes, layer, prompts, outlier_norm=masks.outlier_norm, **passes)
        raw_QD, sae_QL = means_QL.split(codes.widths, dim=1)
        found |= {f"{domain}/raw_QD": raw_QD.clone(), f"{domain}/sae_L": sae_QL.mean(0),
                  f"{domain}/last_D": last_QD.mean(0)}
    return found
