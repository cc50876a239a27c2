"""What the shifted latents are about, by a rule and by a judge, and what one of them does to what the model writes."""

from __future__ import annotations

import numpy as np
import torch

from sts.data.prompts import make_prompt
from sts.engine import generation
from sts.engine import sae_quality as quality
from sts.engine.residuals import Extractor
from sts.engine.sae_training import collect_activations
from sts.engine.zeroing import zeroed
from sts.errors import StsError
from sts.measure import meaning
from sts.measure.score import shifted_dimensions
from sts.measure.sets import matched_latents
from sts.run.stage import stage

#: Sets of latents that fire as often; how far down a list a kind's latents are looked for, in N; tokens of an answer.
SETS, REACH, ANSWER_TOKENS = 20, 5, 48
#: What is answered while a latent is turned up: of no data set, so that records hold the answers.
PROBLEM = "Maria bakes 5 trays of 12 rolls and sells 37 of them. How many rolls are left?"


@stage("folder")
def pool_activations(pool_pieces, lm, layer, report, work, scratch):
    """The residual stream of the documents of `pool`."""
    collect_activations(lm, {layer: scratch}, [ids for _, ids in pool_pieces], pieces_per_shard=64, work=work,
                        report=report)
    return scratch


@stage("tensors")
def pool_activity(reader, pool_activations, pool_pieces, pool):
    """What latents do in each document: kind_D (its place in `pool`), and `document_sums`."""
    return {"kind_D": torch.tensor([[*pool].index(kind) for kind, _ in pool_pieces]),
            **quality.document_sums(reader, pool_activations, len(pool_pieces))}


@stage("parquet")
def latent_labels(pool_activity, pool, permutations, seed):
    """The kind of text that each latent is of: `meaning.label_latents`."""
    return meaning.label_latents(pool_activity, [*pool], permutations=permutations, seed=seed)


@stage("json")
def label_lists(shift, pool_activity, latent_labels, pool, top_n, bootstrap, seed):
    """Rows of `meaning.compared`, intervals over documents, of latents by demonstrations, of the busiest on the same
    questions, and of others that fire as often (like_rate, mean of sets). precision: share of the first N/2, N and 2N
    that are of the first kind; recall: share of each kind's latents in the first 5N, and the first's less the second's
    (`lead`)."""
    kinds, width, rate_L = [*pool], len(latent_labels), torch.tensor(latent_labels["rate"].to_numpy())
    place_BL = meaning.resampled_labels(pool_activity, latent_labels, kinds, resamples=bootstrap, seed=seed)
    orders = {name: shifted_dimensions(shift[field], width) for name, field in (
        ("demonstrations", "squared_difference_L"), ("busiest", "base_fired_L"))}
    precision, recall, reach = [], {}, min(REACH * top_n, width)
    for n in sorted({max(1, top_n // 2), top_n, min(2 * top_n, width // 2)}):
        lists = {name: order_L[:n] for name, order_L in orders.items()}
        lists["like_rate"] = torch.cat([matched_latents(rate_L, lists["demonstrations"], (seed, draw))
                                        for draw in range(SETS)])
        precision += meaning.compared({name: (place_BL[:, own] == 0).mean(1) for name, own in lists.items()}, n=n,
                                      own=n == top_n)
    for place, kind in enumerate(kinds):
        with np.errstate(invalid="ignore"):  # of a kind without latents no share is known
            recall[kind] = {name: (place_BL[:, order_L[:reach]] == place).sum(1) / (place_BL == place).sum(1)
                            for name, order_L in orders.items()}
    recall["lead"] = {name: recall[kinds[0]][name] - recall[kinds[1]][name] for name in orders}
    return {"precision": precision, "recall": [row for kind, own in recall.items() for row in meaning.compared(
        own, kind=kind, n=int((latent_labels["label"] == kind).sum()), reach=reach)]}


@stage("json")
def shifted_examples(shift, latent_labels, lm, reader, pool_activations, pool_pieces, top_n, seed):
    """Cards of the N latents that demonstrations shift most, and of as many that fire as often (`list`): the documents
    on which they fire most and half as much, how strongly, and the tokens that they promote and demote."""
    shifted = shifted_dimensions(shift["squared_difference_L"], top_n)
    alike = matched_latents(torch.tensor(latent_labels["rate"].to_numpy()), shifted, (seed, 0))
    (kinds, pieces), latents = zip(*pool_pieces, strict=True), [*shifted.tolist(), *alike.tolist()]
    firings = quality.Firings(reader, pool_activations, pieces, lm.tokenizer, latents, kinds)
    parts = quality.top_contexts(firings), quality.strengths(firings), quality.promoted_tokens(lm, reader, latents)
    return [{"list": "demonstrations" if place < top_n else "like_rate", **card, **more, **tokens}
            for place, (card, more, tokens) in enumerate(zip(*parts, strict=True))]


@stage("json")
def judge_labels(shifted_examples, latent_labels, pool, judge_url, judge_model, bootstrap, seed, report):
    """What the same latents are about by a language model (`rows`, with prompts and answers), and how far that agrees
    with the rule (`meaning.agreement`)."""
    labels, rule_L = [*pool, meaning.SEVERAL], latent_labels["label"]
    prompts = [generation.judge_prompt(card, labels) for card in shifted_examples]
    answers = generation.ask_judge(judge_url, judge_model, prompts, report)
    rows = [{"latent": card["latent"], "list": card["list"], "rule": rule_L[card["latent"]],
             "judge": generation.judge_label(answer, labels), "prompt": prompt, "answer": answer}
            for card, prompt, answer in zip(shifted_examples, prompts, answers, strict=True)]
    if not any(row["judge"] for row in rows):
        raise StsError(f"No answer of the judge names a kind of text; the first is {answers[0][:80]!r}. Use another "
                       "judge_model.")
    return {"rows": rows, **meaning.agreement(*([row[who] for row in rows] for who in ("rule", "judge")),
                                              resamples=bootstrap, seed=seed)}


@stage("json", version=2)
def steered_answers(lm, reader, layer, masks, shift, latent_labels, pool, top_n, steer_factors, passes):
    """`PROBLEM` answered (greedily) by the model as it is (factor None), and with the first shifted latent of
    the first kind (of any, where there is none) multiplied by each factor; `same`: as by the model as it is."""
    shifted, label_L = shifted_dimensions(shift["squared_difference_L"], top_n).tolist(), latent_labels["label"]
    latent = next((one for one in shifted if label_L[one] == [*pool][0]), shifted[0])
    prompt, answers = make_prompt(lm.tokenizer, PROBLEM), []
    limit, = Extractor(lm, layer, **passes).sink_norms([prompt], masks.outlier_norm)
    for factor in (None, *steer_factors):
        with zeroed(lm, reader, layer, [] if factor is None else [latent], factor=factor or 0.0, norm_limit=limit,
                    drop_first_positions=masks.drop_first_positions):
            text = generation.greedy_answer(lm, prompt.ids, ANSWER_TOKENS)
        answers.append({"factor": factor, "answer": text, "same": not answers or text == answers[0]["answer"]})
    return {"latent": latent, "question": PROBLEM, "answers": answers, "tokens": ANSWER_TOKENS}
