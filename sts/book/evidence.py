"""What a run has to say on each claim: functions of an open run, named by the records in book/claims.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sts.book.claims import NOT_DONE, Claim, Evidence
from sts.book.figures import rows_of, value_of
from sts.errors import NotRecorded, StsError
from sts.measure import cost, paper
from sts.measure.items import above_chance, crossed_mean_interval, paired_mean_interval
from sts.measure.rivals import LABELS, exact_share
from sts.measure.score import concentration, concentrations, overlap_rows, same_fraction, shares_named
from sts.measure.training_sets import list_lead, loss_fall
from sts.run.others import seeds_of
from sts.run.run import OpenRun, open_run
from sts.run.stage import STAGES
from sts.run.store import read

#: The paper's N = 100 of the 28,672 latents of its Qwen SAE.
PAPER_FRACTION = 100, 28_672
#: Training taught something if the loss on held-out problems fell by this share of its start.
SMALLEST_FALL = 0.1
#: Random sets are a control if they come this near to the chosen latents' rate or energy, and share at most this.
MATCH, SHARED = 0.1, 0.5
#: With less than this share of the changes' variance beyond noise (`items.change_quality`) no forecast is judged.
RELIABLE = 0.5
UNLEARNED = "training taught the model too little: the loss on held-out problems fell by less than a tenth"
CHANCE = "before training the model is right no more often than by chance"
UNRELIABLE = "the change is mostly noise"
UNMATCHED = "no random sets match it"
UNREWARDED = "the reward did not rise"
UNFORECAST = "no value of it forecasts"
CODES = {"sae": "SAE latents", "raw": "raw dimensions", "random": "random sparse code"}


def weigh(run: OpenRun, claim: Claim) -> tuple[Evidence | None, str, str]:
    """The evidence on a claim, the verdict, and why there is none."""
    try:
        run = open_run(claim.run).only_stored(reading=False) if claim.run else run
        found: Evidence = globals()[claim.evidence](run, **claim.arguments)
        unable = found.unable or UNLEARNED * (not _learned(run, claim))
    except StsError as error:
        return None, NOT_DONE, str(error) if not isinstance(error, NotRecorded) else "Not in this run's records."
    return found, claim.judge(found, unable), unable


def _learned(run: OpenRun, claim: Claim) -> bool:
    """Whether training taught something: with the run's seed, with every seed, or on the training sets of the claim."""
    if claim.learned == "sets":
        sets, own = run.get("training_matrix"), claim.arguments.get("where", {}).get("training_set")
        return all(sets.loc[(sets["training_set"] == own) | (own is None), "loss_fall"] >= SMALLEST_FALL)
    runs = {"no": [], "own": [run], "every": seeds_of(run)}[claim.learned]
    return all(loss_fall(read(one.get("sft") / "training.json", "json")) >= SMALLEST_FALL for one in runs)


def _at_chance(run: OpenRun) -> bool:
    """Whether accuracy before training is within 1.96 standard errors of guessing, or below."""
    rows = run.get("evaluation_before").query("option >= 0")
    letters = rows[rows["kind"] == "letter"]
    return above_chance(rows if letters.empty else letters)["z"] <= 1.96


def _unreliable(run: OpenRun, measure: str | None) -> bool:
    """Whether the changes in a measure are known too badly to judge a forecast by; not where that is not known."""
    with suppress(StsError):
        return any(value_of(one, "reliability") is not None and one["reliability"] < RELIABLE
                   for one in run.get("change_quality") if one["measure"] == measure)
    return False


def row(run: OpenRun, stage: str, where: Mapping[str, Any] = {}, *, under: str = "", n: str = "n", of: str = "domains",
        against: Mapping[str, Mapping[str, Any]] = {}, each: str = "", among: str = "", **fields: Any) -> Evidence:
    """A number with its interval from the row of a stage (of its part `under`) that has the fields `where`.

    Args:
        against: name -> what differs in the row that the number is held against.
        each: how to call each row, if several are picked: the smallest number is judged, the others stand beside it.
        among: a part of the stage; untestable unless one of its rows `where` has an r above zero.
    """
    found = paper.recomputed_correlations() if stage == "paper" else run.get(stage)
    rows = rows_of(found[under] if under else found)

    def picked(where: Mapping[str, Any], **changed: Any) -> list[tuple[dict, Evidence]]:
        own = [(one, _estimate(one, **{**fields, **changed})) for one in rows if where.items() <= one.items()]
        if len(own) < 1 + bool(each):
            raise StsError(f"Not in stage {stage} of this run: {', '.join(map(str, where.values()))}.")
        return own

    own = picked(where)
    first, number = min(own, key=lambda pair: pair[1].value or 0.0) if each else own[0]
    more = {each.format(**{**one, "predictor": LABELS.get(one.get("predictor", ""))}): other
            for one, other in own if each and one is not first}
    for name, changed in against.items():
        more[name] = picked(**{**changed, "where": {**where, **changed.get("where", {})}})[0][1]
    answered = where.get("measure") in ("accuracy", "p_right")
    unable = (value_of(first, "undefined") or CHANCE * (answered and _at_chance(run))
              or UNRELIABLE * ((first["reliability"] is not None and first["reliability"] < RELIABLE)
                               if "reliability" in first else
                               "measure" in where and stage != "paper" and _unreliable(run, where["measure"]))
              or UNFORECAST * (bool(among) and not any(
                  _estimate(one).above for one in found[among] if where.items() <= one.items()))
              or UNMATCHED * (not all(one.fair for one in more.values())))
    count = value_of(first, n) or (run.get("domain_shift")["domain"].nunique() if of == "domains" else None)
    return replace(number, n=count, of=of, seeds=_seeds(run, stage), against=more, unable=unable)


def _seeds(run: OpenRun, name: str) -> int | None:
    """At how many seeds a stage measures, as far as that is said by what it and its needs are handed."""
    read = [STAGES[one] for one in (name, *STAGES[name].needs)] if name in STAGES else []
    handed = {parameter for one in read for parameter in one.parameters if parameter.startswith("each_")}
    return len(seeds_of(run, STAGES[name])) if handed == {"each_seed"} else None if handed else 1


def _estimate(one: Mapping[str, Any], value: str = "pearson", interval: str = "pearson_interval", p: str = "p",
              sign: int = 1) -> Evidence:
    """The number in fields of a row; dots reach into dicts. A `sign` of -1 turns a difference round."""
    low, high = (value_of(one, f"{interval}.{end}".strip(".")) for end in ("low", "high")[::sign])
    number, low, high = (end if end is None else sign * end for end in (value_of(one, value), low, high))
    chosen, matched = one.get("chosen", 0), one.get("matched", 0)  # of random sets: rate or energy
    fair = abs(matched - chosen) <= MATCH * chosen and one.get("shared", 0) <= SHARED
    return Evidence(number, low, high, value_of(one, p), fair=fair)


def losses(run: OpenRun) -> Evidence:
    """Share of domains that lost accuracy (Tables 2 to 4)."""
    changes = run.get("domain_shift").query("measure == 'accuracy'")["shift"]
    if changes.empty:
        raise StsError("Accuracy was not evaluated in this run.")
    found = exact_share(changes.to_numpy() < 0)
    return Evidence(found["share"], found["low"], found["high"], n=len(changes),
                    unable=CHANCE * _at_chance(run) or UNRELIABLE * _unreliable(run, "accuracy"))


def own_lists(run: OpenRun) -> Evidence:
    """Lead of lists by demonstrations on their own training set's change, and what it is more than by firing rate."""
    rows = run.get("training_overlap")["rows"]
    own, beyond = list_lead(rows, "foreseen"), list_lead(rows, "foreseen", "by_rate")
    return replace(_estimate(own, "lead"), n=len({one["trained"] for one in rows}), of="training sets", seeds=None,
                   unable=own.get("undefined", ""), against={"more than by firing rate": _estimate(beyond, "lead")})


def after_rl(run: OpenRun, **arguments: Any) -> Evidence:
    """`row`, not testable where the reward did not rise in every seed, or fine-tuning beside it taught too little."""
    rewards, found = run.get("rl_rewards"), row(run, **arguments)  # the first says soonest that there are none
    taught = all((fall or 0) >= SMALLEST_FALL for fall in rewards["falls"])
    risen = all((one["low"] or 0) > 0 for one in rewards["rises"] if one["part"] == "reward")
    return replace(found, unable=found.unable or UNREWARDED * (not risen) or UNLEARNED * (not taught))


def cost_ratio(run: OpenRun) -> Evidence:
    """Fine-tuning and evaluation divided by the forecast, in token-forward-passes, as counted."""
    sums = []
    for stages in (("shift", "domain_stats"), ("sft", "evaluation_before", "evaluation_after")):
        records = [run.provenance(stage) for stage in stages]
        if not all(records):
            raise StsError("Not all stages that are compared are there.")
        sums.append(sum(record["work"]["passes"] for record in records))
    return Evidence(sums[1] / sums[0], n=1, of="run")


def planned_cost(run: OpenRun) -> Evidence:
    """The same in token-forward-passes on paper, for the paper's models; the smallest is judged."""
    (value, _), *more = sorted((cost.ratio(one, cost.Settings(), cost.Assumptions()), one.name)
                               for one in cost.ARCHITECTURES.values())
    return Evidence(value, n=1 + len(more), of="models", against={name: Evidence(ratio) for ratio, name in more})


def shares(run: OpenRun, against: Sequence[str] = (), paper_fraction: bool = False) -> Evidence:
    """Share of the change in the N most shifted latents, or in the paper's fraction of them, chosen on other questions
    than measured on (Figures 1a, 2b); beside it other codes, or the share of "activity" in the N most active."""
    moved, top_n, numbers = run.get("sft_shift"), run.settings.top_n, {}
    folds, width = moved["sae/fold_squared_difference_FL"].shape
    for code in ("sae", *against):
        if code == "activity":
            numbers[code] = Evidence(concentration(moved["sae/base_square_sum_L"])[top_n - 1].item())
            continue
        change_FL = moved[f"{code}/fold_squared_difference_FL"]
        count = same_fraction(*(PAPER_FRACTION if paper_fraction else (top_n, width)), change_FL.shape[1])
        found = concentrations(change_FL, count, seed=run.settings.seed).loc[count]
        numbers[CODES[code]] = _estimate(found.to_dict(), "held_out", "")
    return replace(numbers.pop(CODES["sae"]), n=folds, of="groups of questions", against=numbers)


def zeroing(run: OpenRun) -> Evidence:
    """What zeroing the most shifted costs more than zeroing others, in bits per character (Figure 1b)."""
    rows, top_n = run.get("ablation").dropna(subset="bits"), run.settings.top_n
    count = min(sorted(set(rows["latents"]) - {0}), key=lambda number: abs(number - top_n))
    bits = rows[rows["latents"] == count].pivot(index=["kind", "draw"], columns="example_id", values="bits")
    most = bits.loc["most_shifted"].iloc[0]
    energy = {"matched": "others of as much energy"} if "matched" in bits.index else {
        "most_active": "the most active latents"}
    leads = {name: _estimate(crossed_mean_interval(most - bits.loc[kind], against_one=True)._asdict(), "mean", "")
             for kind, name in {"random": "", **energy, "like_rate": "others that fire as often"}.items()
             if kind in bits.index}
    return replace(leads.pop(""), n=len(most), of="problems", against=leads)


def _named(run: OpenRun, values_RL: torch.Tensor, code: str = "sae") -> np.ndarray:
    """Shares of the actual top N that the top N of each row of values name; of other codes N as a fraction."""
    moved = run.get("sft_shift")
    actual_L, width = moved[f"{code}/squared_difference_L"], len(moved["sae/squared_difference_L"])
    return shares_named(values_RL, actual_L, same_fraction(run.settings.top_n, width, len(actual_L)))


def _lead(run: OpenRun, differences_R: np.ndarray) -> Evidence:
    found = paired_mean_interval(differences_R, resamples=run.settings.bootstrap, seed=run.settings.seed)
    return replace(_estimate(found._asdict(), "mean", ""), n=found.n, of="sets of demonstrations")


def foreseen(run: OpenRun) -> Evidence:
    """Share of the actual top N among the N that demonstrations move most, and its lead over lists that need none."""
    stats, top_n = run.get("shift_by_draw"), run.settings.top_n
    found = overlap_rows(run.get("shift")["squared_difference_L"], run.get("sft_shift")["sae/squared_difference_L"],
                         [top_n])[0]
    own_R = _named(run, stats["sae/squared_difference_RL"])
    lists = {"by firing rate": stats["sae/base_fired_L"][None], "by energy": stats["sae/base_square_sum_L"][None],
             "demonstrations of other domains": run.get("shift_by_other_domain")["sae/squared_difference_RL"]}
    return Evidence(own_R.mean().item(), p=found["active_p"], n=len(own_R), of="sets of demonstrations", against={
        f"more than {name}": _lead(run, own_R - _named(run, values_RL)) for name, values_RL in lists.items()})


def better_than_raw(run: OpenRun) -> Evidence:
    """What demonstrations add to activity alone for latents, less what they add for other codes (Figure 2a)."""
    gain, stats = {}, run.get("shift_by_draw")
    for code in CODES:
        alone = torch.stack([stats[f"{code}/{name}"] for name in ("base_fired_L", "base_square_sum_L")])
        gain[code] = _named(run, stats[f"{code}/squared_difference_RL"], code) - _named(run, alone, code).max()
    raw, random = (_lead(run, gain["sae"] - gain[code]) for code in ("raw", "random"))
    return replace(raw, against={"more than a random code": random})


def more_demonstrations(run: OpenRun) -> Evidence:
    """Share foreseen behind the most demonstrations less that behind the fewest."""
    stats = {int(name.partition("/")[2]): values_RL for name, values_RL in run.get("shift_by_demonstrations").items()
             if name.startswith("sae/")}
    return _lead(run, _named(run, stats[max(stats)]) - _named(run, stats[min(stats)]))


def read_outs(run: OpenRun, than: str = "untrained") -> Evidence:
    """What training read-outs of the estimated latents does more, at the largest number and the weakest seed: than
    "untrained" ones, or than "others", the random ones first (Figure 7)."""
    names = {"like_rate": "others that fire as often", "most_active": "the most active"}
    found = {row["kind"]: replace(_estimate(row, "mean", "", ""), n=row["n"], of="problems", seeds=_seeds(
        run, "read_out_leads")) for row in rows_of(run.get("read_out_leads")) if row["largest"] and row["weakest"]}
    return found[than] if than in found else replace(found["random"], against={
        f"more than {name}": found.get(kind, Evidence(None)) for kind, name in names.items()})
