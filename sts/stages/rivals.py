"""Rivals of the score: what they read of training answers, of domains' right answers and of the model; how well they
forecast the size of a change and its sign; how often intervals hold it; and which training problems move a domain."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pandas
import torch

from sts.data.groups import untrained
from sts.data.prompts import Prompt, make_prompt, question_text, solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.finetune import retrained
from sts.engine.generation import open_engine, own_answers
from sts.engine.models import decoder_layers
from sts.engine.rivals import answer_states, first_weights, gradient
from sts.engine.zeroing import changed
from sts.errors import StsError
from sts.measure import rivals
from sts.measure.baselines import split_domains
from sts.measure.compare import SCORES, Comparison
from sts.measure.correlation import correlation_rows, p_value, plain
from sts.measure.items import item_differences, item_measures, paired_mean_interval
from sts.measure.score import chosen_by, shares_named
from sts.run.stage import stage, steps

#: Level of the intervals; measures that an injected state forecasts.
LEVEL, INJECTED = 0.9, ("bits", "p_right")
#: How training problems are ranked, those that should make right answers likelier last; random fifths beside theirs.
RANKINGS, RANDOM = ("projection", "overlap", "influence"), 4


def _prompts(tokenizer, examples, most=2**31):
    """Questions without their options, with the worked solution or the right option's text behind them and no opening
    in between; of at most so many tokens, without questions that fill these."""
    found = [solution_prompt(tokenizer, replace(one, options=(), answer_index=-1)) for one in examples]
    return [Prompt(ids[:most], (first, min(last, most))) for ids, (first, last) in found if first < most]


@stage("json")
def greedy_answers(fresh_lm, train, rival_problems, rival_tokens, eval_batch, work):
    """The untuned model's own greedy answers to the first training problems: example_id and answer."""
    lm, asked = fresh_lm(), train[:rival_problems]
    texts = [text for text, _ in own_answers(open_engine(lm, batch=eval_batch), asked, rival_tokens)]
    work.of_layers = layers = len(decoder_layers(lm.model))
    for one, text in zip(asked, texts, strict=True):
        ids = make_prompt(lm.tokenizer, question_text(one)).ids
        work.add(tokens := len(ids) + len(lm.tokenizer(text)["input_ids"]), tokens, layers)
    return [{"example_id": one.example_id, "answer": text} for one, text in zip(asked, texts, strict=True)]


@stage("tensors", version=2)
def training_answer_states(lm, reader, layer, train, greedy_answers, rival_tokens, masks, passes):
    """`answer_states` of training answers and of the model's own, training_raw_ED, own_raw_ED and so on, over their
    first `rival_tokens` tokens (of both alike, as one is cut there); place_E: the problem's place in the training set.
    """
    answers = {place: row["answer"] for place, row in enumerate(greedy_answers) if row["answer"]}
    if not answers:
        raise StsError("The untuned model answers no training problem with a word; raise rival_tokens.")
    sides = {"training": [train[at] for at in answers],
             "own": [replace(train[at], solution=text) for at, text in answers.items()]}
    return {"place_E": torch.tensor([*answers])} | {
        f"{side}_{name}": tensor for side, examples in sides.items() for name, tensor in answer_states(
            lm, reader, layer, _prompts(lm.tokenizer, examples), most=rival_tokens, outlier_norm=masks.outlier_norm,
            **passes).items()}


@stage("tensors", version=2)
def domain_answer_states(lm, reader, layer, questions, rival_questions, masks, report, passes):
    """`answer_states` of each domain's first questions with their right answers: domain/raw_ED; of the others the means
    over questions, domain/sae_L and domain/last_D."""
    found = {}
    for (domain, group), _ in steps(questions.items(), report):
        own = answer_states(lm, reader, layer, _prompts(lm.tokenizer, group[:rival_questions]),
                            outlier_norm=masks.outlier_norm, **passes)
        found |= {f"{domain}/raw_ED": own["raw_ED"], f"{domain}/sae_L": own["sae_EL"].mean(0),
                  f"{domain}/last_D": own["last_ED"].mean(0)}
    return found


@stage("parquet")
def injection(lm, layer, training_answer_states, domain_answer_states, questions, shots, masks, eval_kinds, eval_limit,
              eval_batch, rival_questions, rival_alpha, report, work, scratch):
    """Stage `evaluation_before` on domains' first questions, with the training data's mean state added to the residual
    stream `rival_alpha` times (Data2Behavior, arXiv 2602.04735): that at the last token of training answers, less the
    neutral one, which is that of domains' right answers, mean over domains."""
    neutral = torch.stack([own["last_D"] for own in split_domains(domain_answer_states).values()]).mean(0)
    added_D = (rival_alpha * (training_answer_states["training_last_ED"].mean(0) - neutral)).to(lm.device)
    asked = [one for group in questions.values() for one in group[:eval_limit or None][:rival_questions]]
    with changed(lm, layer, lambda own_TD: own_TD + added_D, drop_first_positions=masks.drop_first_positions):
        return evaluate(lm, asked, kinds=eval_kinds, shots=shots, batch=eval_batch, scratch=scratch, report=report,
                        work=work)


@stage("json", version=2)
def influence(fresh_lm, train, questions, rival_problems, rival_questions, sft_max_length, sft_micro_batch, lora_rank,
              lora_alpha, seed, report, work):
    """Domain -> minus the inner product of gradients where fine-tuning starts: of the training answers' loss and of the
    domain's right answers'. To first order that is the change of the latter, in nats per token, by a step of gradient
    descent, over its rate (LESS, Xia et al. 2024, arXiv 2402.04333, without a warm-up)."""
    lm = fresh_lm()
    weights = first_weights(lm, lora_rank, lora_alpha, seed)
    parts = [train[:rival_problems], *(group[:rival_questions] for group in questions.values())]
    found = (gradient(lm, weights, _prompts(lm.tokenizer, own, sft_max_length), micro_batch=sft_micro_batch, work=work)
             for own, _ in steps(parts, report))  # one at a time, as each is as large as the adapters
    training_G = next(found)
    return {domain: -(training_G @ own_G).item() for domain, own_G in zip(questions, found, strict=True)}


@stage("parquet")
def rival_values(scores, shift, domain_stats, training_answer_states, domain_answer_states, injection, influence,
                 evaluation_before, reader, top_n):
    """Every rival and both scores, one row a domain. closeness: of `top_n` latents; logme: can a linear model tell the
    domain's answers from the training set's; sts_split: STS_act of latents that rise behind demonstrations less that of
    those that fall; icl_dot: dot product of the training set's and the domain's mean change behind demonstrations."""
    known, domains, chosen = training_answer_states, split_domains(domain_answer_states), chosen_by(shift, top_n)
    raw_DD = torch.stack([own["raw_ED"].mean(0) for own in domains.values()])
    sae_DL = torch.stack([own["sae_L"] for own in domains.values()])
    raw, own_raw, sae, own_sae = (known[f"{side}_{kind}"] for kind in ("raw_ED", "sae_EL")
                                  for side in ("training", "own"))
    moved_L, sums = shift["difference_L"] / shift["tokens"], split_domains(domain_stats)
    after = item_measures(injection)
    change = (after[[*INJECTED]] - item_measures(evaluation_before)[[*INJECTED]]).loc[after.index]
    return pandas.DataFrame({
        "pd_raw": rivals.projection_difference(raw, own_raw, raw_DD).mean(0),
        "pd_sae": rivals.projection_difference(sae, own_sae, sae_DL).mean(0),
        "pd_chosen": rivals.projection_difference(sae, own_sae, sae_DL, chosen).mean(0),
        "influence": [influence[name] for name in domains],
        "closeness": rivals.closeness((sae - own_sae).mean(0), sae_DL, reader.W_dec.cpu(), top_n),
        "logme": [rivals.logme(np.concatenate([own["raw_ED"], raw]),
                               np.arange(len(own["raw_ED"]) + len(raw)) < len(own["raw_ED"]))
                  for own in domains.values()],
        "sts_split": [((sums[name]["base_sum_L"] * moved_L.sign())[chosen].sum() / sums[name]["tokens"]).item()
                      for name in domains],
        "icl_dot": [(sums[name]["difference_L"] @ moved_L / sums[name]["tokens"]).item() for name in domains],
    }, index=pandas.Index(domains, name="domain"), dtype=float).join(
        change.groupby(after["domain"]).mean().add_prefix("injection_")).join(
        scores[scores["variant"] == "paper"].set_index("domain")[[*SCORES]]).reset_index()


@stage("json", also=("rival_values", "evaluation_before", "evaluation_after"))
def rival_correlations(each_seed, bootstrap, permutations, seed):
    """r of both scores and of every rival with the absolute change, mean over seeds, as `compare.Comparison.rows`; of a
    forecast with a sign its size counts. kind: "score" or "rival"."""
    tables, rows = [own.get("rival_values").set_index("domain") for own in each_seed], []
    for measure, differences in item_differences({own.settings.seed: (
            own.get("evaluation_before"), own.get("evaluation_after")) for own in each_seed}).items():
        values = {name: np.stack([table.loc[sorted(differences), name] for table in tables])
                  for name in (*SCORES, *rivals.RIVALS)}
        compared = Comparison(differences, {name: np.abs(own_SN) if rivals.RIVALS.get(name) else own_SN
                                            for name, own_SN in values.items()},
                              bootstrap=bootstrap, permutations=permutations, seed=seed)
        rows += [{"measure": measure, "predictor": name, "kind": "score" if name in SCORES else "rival", **row}
                 for name, row in compared.rows(against=SCORES).items()]
    return rows


@stage("json", version=2)
def rival_tests(each_rival_set, sft_data):
    """What holds of the run's own training set (part "own") and of all others ("others"), means over seeds.

    signs: `rivals.signs` of every forecast that has one, with likelier right answers as up; pearson: r with the signed
    change, mean over sets; best: whether most signs are right on the own set (of those that tie, at the largest r), so
    that it alone is tested on the others. coverage: `rivals.coverage` of the absolute change by either score, each
    domain from all others of the own set, and those of other sets from all of the own set.
    """
    means: Any = pandas.concat([own.get("rival_values").merge(own.get("domain_shift").pivot(
        index="domain", columns="measure", values="shift"), on="domain").assign(set=own.settings.sft_data)
        for own in each_rival_set]).groupby(["set", "domain"]).mean()
    parts = {"own": means.loc[[sft_data]], "others": means.drop(index=sft_data, level=0)}
    found: dict[str, list[Any]] = {"signs": [], "coverage": []}
    names = [name for name, sign in rivals.RIVALS.items() if sign]
    for measure, up in rivals.UP.items():
        rows = []
        for part, cells in parts.items() if measure in means and parts["own"][measure].any() else ():
            sets = [(one, up * one[measure].to_numpy()) for _, one in cells.groupby(level=0)]
            for name in (name for name in names if sets and cells[name].notna().all()):
                said = [rivals.RIVALS[name] * one[name].to_numpy() for one, _ in sets]
                rows.append({"measure": measure, "part": part, "forecast": name, "pearson": float(np.mean([
                    correlation_rows(own_N, gain_N) for own_N, (_, gain_N) in zip(said, sets, strict=True)])),
                    **rivals.signs(np.concatenate(said), np.concatenate([gain_N for _, gain_N in sets]),
                                   np.sign(up * parts["own"][measure]).sum() or 1.0)})
            for score in SCORES if sets else ():
                x_N, y_N = (parts["own"][field].abs().to_numpy() for field in (score, measure))
                cases = [(x_N, y_N, one[score].to_numpy(), np.abs(gain_N)) for one, gain_N in sets] \
                    if part == "others" else [(np.delete(x_N, at), np.delete(y_N, at), x_N[[at]], y_N[[at]])
                                              for at in range(len(x_N))]
                with suppress(StsError):  # too few domains for an interval
                    found["coverage"].append({"measure": measure, "score": score, "part": part,
                                              **rivals.coverage(cases, LEVEL)})
        best = max((row for row in rows if row["part"] == "own"), default={},
                   key=lambda row: (row["share"], np.nan_to_num(row["pearson"])))
        found["signs"] += [row | {"best": row["forecast"] == best["forecast"]} for row in rows]
    return plain(found)


@stage("parquet")
def example_forecasts(fresh_lm, train, questions, scores, training_answer_states, domain_answer_states, example_domains,
                      top_n, rival_questions, sft_max_length, lora_rank, lora_alpha, seed, report, work):
    """What each training problem should do for a domain of highest STS_act that is not trained on: place (of the
    problem), domain, projection (`rivals.projection_difference`), overlap (share of the domain's `top_n` most active
    latents that are the answer's too), influence (inner product of both losses' gradients)."""
    own, known = scores[scores["variant"] == "paper"].set_index("domain")["sts_act"], training_answer_states
    chosen = own[untrained(own.index, train)].nlargest(example_domains).index
    if chosen.empty:
        return pandas.DataFrame(columns=["place", "domain", *RANKINGS])
    lm, domains, rows = fresh_lm(), split_domains(domain_answer_states), []
    weights = first_weights(lm, lora_rank, lora_alpha, seed)
    projected_ED = rivals.projection_difference(known["training_raw_ED"], known["own_raw_ED"], torch.stack(
        [one["raw_ED"].mean(0) for one in domains.values()]))

    def slope(examples):
        return gradient(lm, weights, _prompts(lm.tokenizer, examples, sft_max_length), micro_batch=1, work=work)

    goals = [(name, slope(questions[name][:rival_questions]), shares_named(
        known["training_sae_EL"], domains[name]["sae_L"], top_n)) for name in chosen]
    for (at, place), _ in steps(enumerate(known["place_E"].tolist()), report):
        own_G = slope([train[place]])
        rows += [{"place": place, "domain": name, "projection": projected_ED[at, [*domains].index(name)].item(),
                  "overlap": shared_E[at], "influence": (own_G @ goal_G).item()} for name, goal_G, shared_E in goals]
    return pandas.DataFrame(rows)


@stage("parquet")
def example_retraining(example_forecasts, fresh_lm, train, questions, shots, eval_limit, eval_kinds, eval_batch,
                       fine_tuning, seed, report, work, scratch):
    """Every measure of a domain's questions after training on all ranked problems but a fifth: ranking, left_out (its
    "top" or "bottom"; of ranking "random" the number of the draw), domain, example_id, and `MEASURES`."""
    places, names = ([*dict.fromkeys(example_forecasts[name])] for name in ("place", "domain"))
    if not places:
        return pandas.DataFrame(columns=["domain", "example_id", "ranking", "left_out"])
    fifth = max(1, len(places) // 5)
    left = {("random", str(draw), None): random.Random(f"{seed} {draw}").sample(places, fifth)
            for draw in range(RANDOM)}
    for name, ranking in itertools.product(names, RANKINGS):
        own: Any = example_forecasts[example_forecasts["domain"] == name]
        ordered = own.sort_values(ranking, kind="stable")["place"].tolist()
        left |= {(ranking, "top", name): ordered[-fifth:], (ranking, "bottom", name): ordered[:fifth]}
    frames = []
    for ((ranking, end, name), gone), told in steps(left.items(), report):
        asked = [one for own in ([name] if name else names) for one in questions[own][:eval_limit or None]]
        frames.append(retrained(
            fresh_lm, [train[place] for place in places if place not in gone], fine_tuning,
            scratch / f"{ranking}-{end}-{name}", lambda lm, asked=asked: item_measures(evaluate(
                lm, asked, kinds=eval_kinds, shots=shots, batch=eval_batch, work=work)).reset_index(),
            report=told, work=work).assign(ranking=ranking, left_out=end))
    return pandas.concat(frames, ignore_index=True)


@stage("json", also=("example_retraining", "example_domains"))
def example_effects(each_seed, bootstrap, seed):
    """How much likelier right answers are without the bottom fifth of a ranking than without its top: a row a ranking
    and measure with the mean over seeds and an interval over questions, p (share of the leads of all fifths, random or
    ranked, over one another that are as large) and `each` by seed and domain. Empty where none are ranked."""
    frames = {own.settings.seed: own.get("example_retraining") for own in each_seed if own.settings.example_domains}
    rows, numbers = [], {"resamples": bootstrap, "seed": seed}
    evaluated = pandas.concat([*frames.values()]).notna().any() if frames else {}
    for measure, ranking in itertools.product([name for name in rivals.UP if evaluated.get(name)], RANKINGS):
        wide = {one: rivals.UP[measure] * own[own["ranking"].isin(["random", ranking])].pivot(
            index=["domain", "example_id"], columns=["ranking", "left_out"], values=measure)
            for one, own in frames.items()}
        leads = {one: own[ranking, "bottom"] - own[ranking, "top"] for one, own in wide.items()}
        among = [np.mean(one) for one in itertools.product(*([first - second for first, second in (
            itertools.permutations(own.mean(), 2))] for own in wide.values()))]
        cells = pandas.concat(leads.values())
        own: Any = cells.groupby(level=["domain", "example_id"]).sum()  # a question counts once, at all its seeds
        rows.append({"measure": measure, "ranking": ranking,
                     **paired_mean_interval(own * len(own) / len(cells), **numbers)._asdict(),
                     "p": float(p_value(np.array(among), np.mean([one.mean() for one in leads.values()]), exact=True)),
                     "each": [{"seed": one, "domain": name, **paired_mean_interval(part, **numbers)._asdict()}
                              for one, lead in leads.items() for name, part in lead.groupby("domain")]})
    return plain(rows)
