"""Reinforcement learning beside fine-tuning on the same problems: which latents each moves, whether demonstrations, of
the data's solutions or of own right answers, foresee them, and what the score says with the actual list (Figure 6)."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import torch

from sts.engine.evaluate import evaluate
from sts.engine.extract import shift_by_training, shifts_behind
from sts.engine.reinforcement import reinforce, right_answer
from sts.errors import StsError
from sts.measure.baselines import split_domains
from sts.measure.compare import SCORES, Comparison
from sts.measure.correlation import plain
from sts.measure.items import change_quality, item_differences, paired_mean_interval
from sts.measure.score import overlap_rows, score_domains, shares_named
from sts.measure.training_sets import loss_fall
from sts.run.stage import stage
from sts.run.store import read

#: Training -> the stage of its actual shift.
TRAININGS = {"sft": "sft_shift", "rl": "rl_shift"}
#: What a reward consists of.
PARTS = ("reward", "correct", "ended")


@stage("folder", parallel=True)
def rl(fresh_lm, train, rl_steps, rl_lr, rl_kl, rl_problems, rl_group, rl_micro_batch, rl_tokens, lora_rank, lora_alpha,
       seed, report, work, scratch):
    """GRPO on the training problems: adapter, and training.json, what `engine.reinforcement.reinforce` returns."""
    log = reinforce(fresh_lm(), train, scratch, steps=rl_steps, lr=rl_lr, kl=rl_kl, problems=rl_problems,
                    group=rl_group, micro_batch=rl_micro_batch, tokens=rl_tokens, lora_rank=lora_rank,
                    lora_alpha=lora_alpha, seed=seed, report=report, work=work)
    if log:  # the main process alone has one
        (scratch / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree((scratch / "checkpoints").rename(scratch / "finished"))
    return scratch


@stage("tensors")
def rl_shift(lm, reinforced, reader, layer, shift_groups, masks, report, passes):
    """Stage `sft_shift` after reinforcement learning."""
    return shift_by_training(lm, reinforced, reader, layer, shift_groups, masks, report=report, **passes)


@stage("parquet")
def rl_evaluation(reinforced, questions, shots, eval_limit, eval_batch, eval_kinds, report, work, scratch):
    """Stage `evaluation_before` after reinforcement learning."""
    return evaluate(reinforced, [one for group in questions.values() for one in group[:eval_limit or None]],
                    kinds=eval_kinds, shots=shots, batch=eval_batch, scratch=scratch, report=report, work=work)


@stage("tensors")
def rollout_shift(lm, reader, layer, train, masks, rl_group, rl_tokens, overlap_tokens, overlap_draws,
                  shift_demonstrations, seed, report, passes):
    """Stage `shift_by_draw` with two kinds of demonstrations of the same problems: own/..., a right answer out of
    `rl_group` sampled from the untuned model, and given/..., the data set's; also `asked` and `solved`, numbers of
    problems, the last until there are enough; where they never are, these alone."""
    pairs, needed, asked = [], overlap_draws * shift_demonstrations, 0
    torch.manual_seed(seed)
    for example in random.Random(seed).sample(train, len(train)):
        if len(pairs) < needed:
            text, asked = right_answer(lm, example, rl_group, rl_tokens), asked + 1
            pairs += [(replace(example, solution=text), example)] if text else []
            report(0.5 * max(len(pairs) / needed, asked / len(train)))
    found = {"asked": torch.tensor([asked]), "solved": torch.tensor([len(pairs)])}
    if len(pairs) == needed < len(train):
        questions = [one for one in train if one not in [given for _, given in pairs]]
        for kind, told in zip(("own", "given"), zip(*pairs, strict=True), strict=True):
            shifts = shifts_behind([told[draw::overlap_draws] for draw in range(overlap_draws)], questions,
                                   overlap_tokens, lm, reader, layer, masks, **passes)
            found |= {f"{kind}/{name}": tensor for name, tensor in shifts.items()}
    return found


def _log(own, name="rl") -> dict:
    return read(own.get(name) / "training.json", "json")


def _lowest_first(rows) -> list[dict]:
    """By where their intervals begin, those without one at the head."""
    return sorted(plain(rows), key=lambda row: -math.inf if row.get("low") is None else row["low"])


def _rises(runs, bootstrap) -> list[dict]:
    """Of each part of the reward, its means over the first and the last fifth of the steps and the rise, with an
    interval over the n steps of a fifth; the one whose interval begins lowest first."""
    rows = []
    for own, curve, part in ((own, _log(own)["curve"], part) for own in runs for part in PARTS):
        fifth, values = max(1, len(curve) // 5), np.array([row[part] for row in curve])
        first, last = values[:fifth], values[-fifth:]
        rise = paired_mean_interval(last - first, resamples=bootstrap, seed=own.settings.seed)
        rows.append({"data": own.settings.sft_data, "seed": own.settings.seed, "part": part, "steps": len(curve),
                     "n": fifth, "first": first.mean(), "last": last.mean(), "rise": rise.mean, "low": rise.low,
                     "high": rise.high})
    return _lowest_first(rows)


@stage("json")
def rl_rewards(each_rl, bootstrap):
    """rises: see `_rises`; curves: what TRL logs of every step; batch: the last step's answers to problems in groups of
    `group`, of the run's own seed; falls: of the held-out loss by the fine-tuning beside it, as shares."""
    logs, losses = ([_log(own, name) for own in each_rl] for name in ("rl", "sft"))
    return {"rises": _rises(each_rl, bootstrap), "batch": logs[0]["batch"], "group": logs[0]["group"],
            "curves": [{"seed": own.settings.seed, **row} for own, log in zip(each_rl, logs, strict=True)
                       for row in log["curve"]],
            "falls": plain([loss_fall(log) for log in losses])}


@stage("json", version=2)
def rl_overlap(each_rl, top_n, bootstrap):
    """lists: `overlap_rows` at N of the estimated list and the actual one after each training, by seed; sets: share of
    the actual list that sets of demonstrations name, by training and whose answers they have (data, and where right
    ones suffice, given and own; none: the latents that fire most), with an interval over sets; leads: sft_less_rl,
    half_sft_less_rl and own_less_given, set by set. All are of one seed each; the lead that begins lowest comes first.
    """
    lists, sets, leads = [], [], []
    for own in each_rl:
        answers, shift = own.get("rollout_shift"), own.get("shift")
        told = {"data": own.get("shift_by_draw")["sae/squared_difference_RL"], "none": shift["base_fired_L"][None]}
        told |= {kind: answers[f"{kind}/sae/squared_difference_RL"] for kind in ("own", "given") if len(answers) > 2}
        seed, shares, numbers = own.settings.seed, {}, {"resamples": bootstrap, "seed": own.settings.seed}
        for training, actual in TRAININGS.items():
            moved_L = own.get(actual)["sae/squared_difference_L"]
            shared, = overlap_rows(shift["squared_difference_L"], moved_L, [top_n])
            lists.append({"seed": seed, "training": training, **shared})
            for kind, values_RL in told.items():
                shares[training, kind] = shares_named(values_RL, moved_L, top_n)
        sets += [{"seed": seed, "training": training, "answers": kind,
                  **paired_mean_interval(values, **numbers)._asdict()} for (training, kind), values in shares.items()]
        for name, part, one, other in (("sft_less_rl", 1.0, ("sft", "data"), ("rl", "data")),
                                       ("half_sft_less_rl", 0.5, ("sft", "data"), ("rl", "data")),
                                       ("own_less_given", 1.0, ("rl", "own"), ("rl", "given"))):
            lead = {"undefined": "too few right answers"} if one not in shares else paired_mean_interval(
                np.multiply(part, shares[one]) - shares[other], **numbers)._asdict()
            leads.append({"seed": seed, "lead": name, **lead})
    return plain({"lists": lists, "sets": sets, "leads": _lowest_first(leads)})


@stage("json", version=2)
def rl_correlations(each_rl, top_n, bootstrap, permutations, seed):
    """`compare.Comparison` of each measure, list of latents (estimated, actual) and score with the absolute change by
    reinforcement learning, mean over seeds; `less`: other "list/score"; also `reliability` of the change, if known."""
    rows, values = [], {f"{kind}/{score}": [] for kind in ("estimated", "actual") for score in SCORES}
    changes = item_differences({own.settings.seed: (own.get("evaluation_before"), own.get("rl_evaluation"))
                                for own in each_rl})
    for own in each_rl:
        domains = split_domains(own.get("domain_stats"))
        for kind, shift in ("estimated", own.get("shift")), ("actual", split_domains(own.get("rl_shift"))["sae"]):
            found = score_domains("paper", shift, domains, top_n)
            for score in SCORES:
                values[f"{kind}/{score}"].append({row["domain"]: row[score] for row in found})
    for measure, differences in changes.items():
        compared = Comparison(differences, {name: np.array([[own[domain] for domain in sorted(differences)]
                                                            for own in seeds]) for name, seeds in values.items()},
                              bootstrap=bootstrap, permutations=permutations, seed=seed)
        try:
            reliability = change_quality(differences, seed=seed)["reliability"]
        except StsError:  # a domain with a single question
            reliability = None
        for name, row in compared.rows(against=[*values]).items():
            kind, _, score = name.partition("/")
            rows.append({"measure": measure, "list": kind, "score": score, "reliability": reliability, **row})
    return plain(rows)
