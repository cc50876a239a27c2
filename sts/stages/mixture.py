"""Mixing examples of two evaluation domains into the training set (Table 10, Figure 5): of the one forecast to move
most and of the one forecast to move least, answered by the untuned model itself."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial

import pandas

from sts.data.groups import untrained
from sts.data.prompts import question_text
from sts.engine.evaluate import evaluate
from sts.engine.finetune import retrained
from sts.engine.generation import open_engine, own_answers
from sts.errors import StsError
from sts.measure.items import item_measures, of_weakest_seed, paired_mean_interval
from sts.run.stage import stage, steps

UNHARMED = "not both domains were harmed"
UNGAINED = "plain training gained nothing"


def divided(scores: dict[str, float], rooms: dict[str, int], kinds: list[str], shares: list[float], most: int) -> list:
    """Mixtures: name, kind, step, and examples of each domain, by its score and how many it has. Those of one step hold
    equally many, whatever their kind; the largest as many as there are for all kinds, `most` at most."""
    weights = {"sts": {name: value / sum(scores.values()) for name, value in scores.items()},
               "even": dict.fromkeys(scores, 1 / len(scores))}
    whole = min([most, *(math.floor(rooms[name] / weights[kind][name] + 1e-9) for kind in kinds for name in scores)])
    first, second = scores
    return [{"mixture": f"{kind} {step:g}", "kind": kind, "step": step, "examples": {
        first: (own := round((total := round(step * whole)) * weights[kind][first])), second: total - own}}
        for kind in kinds for step in sorted(shares)]


@stage("json")
def mixture_plan(scores, train, questions, mixture_steps, mixture_kinds, mixture_examples, seed):
    """domains: the one of highest STS_ICL and the one of lowest, but for those that are trained on, with their score
    and the ids of their halves, to train on and to test; mixtures: rows of `divided`."""
    if not mixture_steps:
        raise StsError("mixture_steps is empty: name the shares to add, such as [0.5, 1.0].")
    own = scores[(scores["variant"] == "paper") & (scores["sts_icl"] > 0)].set_index("domain")["sts_icl"]
    own = own[untrained(own.index, train)]
    if len(own) < 2:
        raise StsError(f"A mixture needs two domains beside the trained, with scores above zero; here are {len(own)}.")
    domains = []
    for name in (own.idxmax(), own.idxmin()):
        if len(questions[name]) < 2:
            raise StsError(f"Domain {name!r} has one question, which cannot be halved; raise domain_limit.")
        ids = [example.example_id for example in random.Random(seed).sample(questions[name], len(questions[name]))]
        half = len(ids) // 2
        domains.append({"domain": name, "sts_icl": float(own[name]), "train": ids[:half], "test": ids[half:]})
    return {"domains": domains, "mixtures": divided(
        {row["domain"]: row["sts_icl"] for row in domains}, {row["domain"]: len(row["train"]) for row in domains},
        mixture_kinds, mixture_steps, mixture_examples)}


@stage("json")
def mixture_answers(mixture_plan, fresh_lm, questions, mixture_tokens, eval_batch, work):
    """The untuned model's own answers to as many of the first halves as the largest mixture takes: example_id, answer,
    and whether it is whole; greedy, to the very prompt that is trained on."""
    asked = [example for row in mixture_plan["domains"] for name in row["train"][:max(
        own["examples"][row["domain"]] for own in mixture_plan["mixtures"])]
        for example in questions[row["domain"]] if example.example_id == name]
    found = own_answers(open_engine(fresh_lm(), batch=eval_batch), asked, mixture_tokens)
    if cut := sum(not whole for _, whole in found):
        work.note(f"{cut} of {len(found)} own answers are cut at mixture_tokens.")
    return [{"example_id": one.example_id, "answer": text, "whole": whole}
            for one, (text, whole) in zip(asked, found, strict=True)]


@stage("parquet")
def mixture(mixture_plan, mixture_answers, lm, fresh_lm, tuned, train, held_out, questions, shots, eval_kinds,
            eval_batch, fine_tuning, report, work, scratch):
    """Every measure of the two domains' test halves and of held-out training problems: mixture ("untuned", "none": by
    stage `sft`, and those of the plan), domain ("training set" for held-out problems), example_id, and `MEASURES`."""
    answers = {row["example_id"]: row["answer"] for row in mixture_answers}
    by_id = {example.example_id: example for group in questions.values() for example in group}
    tests = [by_id[name] for row in mixture_plan["domains"] for name in row["test"]]

    def trained(row, told):
        # As open questions, options written out, so that nothing is put behind the model's own words.
        added = [replace(by_id[name], question=question_text(by_id[name]), options=(), answer_index=-1, answer="",
                         solution=answers[name]) for own in mixture_plan["domains"]
                 for name in own["train"][:row["examples"][own["domain"]]]]
        return retrained(fresh_lm, [*train, *added], fine_tuning, scratch / row["mixture"].replace(" ", "-"),
                         partial(measured, name=row["mixture"]), report=told, work=work)

    def measured(model, name):
        parts = [item_measures(evaluate(model, tests, kinds=eval_kinds, shots=shots, batch=eval_batch, work=work)),
                 item_measures(evaluate(model, held_out, kinds=("solution",), batch=eval_batch, work=work)).assign(
                     domain="training set").rename(index="held out: {}".format)]  # perhaps of the same set
        return pandas.concat(parts).reset_index().assign(mixture=name)

    return pandas.concat([measured(lm, "untuned"), measured(tuned, "none"), *(
        trained(row, told) for row, told in steps(mixture_plan["mixtures"], report))], ignore_index=True)


@stage("parquet", also=("mixture", "mixture_steps"))
def mixture_effects(each_seed, mixture_seeds, bootstrap, seed):
    """What the largest mixture by score does, a row a seed with mean and interval: bits per character that it takes off
    test halves more than another training (than: "none", "even"; place: "most", "least"), and the share of plain
    training's gain on held-out problems that it keeps (than "gain"; the interval is that of the ratio's linear part).
    weakest: see `items.of_weakest_seed`; undefined: why it says nothing."""
    rows, why = [], {"none": "", "gain": ""}
    for own in (one for one in each_seed if one.settings.seed in (seed, *mixture_seeds)):
        bits = own.get("mixture").pivot(index=["domain", "example_id"], columns="mixture", values="bits")
        if bits.isna().to_numpy().any():
            raise StsError("Mixtures are compared by bits; eval_kinds must hold text or solution.")
        step = f" {max(own.settings.mixture_steps):g}"
        mixed, domains = bits[f"sts{step}"], [row["domain"] for row in own.get("mixture_plan")["domains"]]
        gain, kept = ((bits["untuned"] - after).loc["training set"] for after in (bits["none"], mixed))
        share = kept.mean() / gain.mean()
        parts = {("gain", "training set", "training set"): share + (kept - share * gain) / gain.mean()} | {
            (other.removesuffix(step), place, name): (bits[other] - mixed).loc[name]
            for other in ("none", f"even{step}") if other in bits
            for place, name in zip(("most", "least"), domains, strict=True)}
        rows += [{"than": than, "place": place, "domain": name, "seed": own.settings.seed,
                  **paired_mean_interval(values, resamples=bootstrap)._asdict()}
                 for (than, place, name), values in parts.items()]
        if not all((bits["none"] - bits["untuned"]).loc[name].mean() > 0 for name in domains):
            why["none"] = UNHARMED
        if not paired_mean_interval(gain, resamples=bootstrap).low > 0:
            why["gain"] = UNGAINED
    found = pandas.DataFrame(rows)
    return found.assign(weakest=of_weakest_seed(found, "than", "place"), undefined=found["than"].replace(
        why | {"even": ""}))
