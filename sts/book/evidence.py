"""What a run has to say on each claim: functions of an open run, named by the records in book/claims.yaml."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas
import torch

from sts.book.claims import NOT_DONE, Claim, Estimate, Evidence, NotDone
from sts.errors import StsError
from sts.measure import paper
from sts.measure.crossed import crossed_mean_interval
from sts.measure.items import MeanInterval, paired_mean_interval
from sts.measure.shift import concentration, overlap, shifted_dimensions
from sts.measure.shift_stats import concentrations, overlap_rows, same_fraction

if TYPE_CHECKING:
    from sts.run.run import OpenRun

#: The paper's N = 100 of 28,672 latents (its Qwen SAE), as a fraction.
PAPER_FRACTION = 100 / 28_672
#: A run, or a training set, learned if the loss on held-out problems fell by this share of its start.
SMALLEST_FALL = 0.1
#: Random sets are a control if they come this near to the chosen latents' firing rate or energy, and share at most this.
MATCH, SHARED = 0.1, 0.5
#: Why a claim cannot be tested.
UNLEARNED = "training taught the model too little: the loss on held-out problems fell by less than a tenth"
CHANCE = "before training the model is right no more often than by chance"
KINDS = ("sae", "raw", "random")


def weigh(run: OpenRun | Stored, claim: Claim) -> tuple[Evidence | None, str, str]:
    """The evidence on a claim, the verdict, and why there is none."""
    try:
        found: Evidence = globals()[claim.evidence](run, **claim.arguments)
        idle = not found.unable and claim.learned in ("own", "every") and not _learned(run, claim.learned == "every")
    except StsError as error:
        return None, NOT_DONE, str(error)
    if idle:
        found = Evidence(**{**vars(found), "unable": UNLEARNED})
    return found, claim.judge(found), found.unable


class Stored:
    """A run of which nothing is computed: what is not stored raises `NotDone`."""

    def __init__(self, run: OpenRun):
        self.run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)

    def get(self, stage: str) -> Any:
        """The stage's stored result."""
        if not is_stored(self.run, stage):
            raise NotDone(f"Stage {stage} of run {self.run.settings.name!r} is not there.")
        return self.run.get(stage)


def is_stored(run: OpenRun, stage: str) -> bool:
    """Whether the stage's result is there; nothing is computed."""
    try:
        return bool(run.stored(stage))
    except StsError:  # neither recorded nor the model and the data at hand
        return False


# --- looking up ---------------------------------------------------------------------------------------------------

def one(rows: Any, **wanted: Any) -> dict:
    """The row with these fields; `NotDone` without one."""
    rows = rows.to_dict("records") if isinstance(rows, pandas.DataFrame) else rows
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    raise NotDone(f"Not evaluated in this run: {', '.join(map(str, wanted.values()))}.")


def _interval(row: Mapping[str, Any], value: str = "pearson", interval: str = "pearson_interval") -> Estimate:
    ends = row.get(interval) or {}
    return Estimate(row.get(value), ends.get("low"), ends.get("high"), row.get("p"))


def _of(found: MeanInterval) -> Estimate:
    known = not math.isnan(found.low)
    return Estimate(found.mean, found.low if known else None, found.high if known else None)


def _evidence(main: Estimate, **more: Any) -> Evidence:
    return Evidence(main.value, main.low, main.high, main.p, **more)


def _unable(run: OpenRun, row: Mapping[str, Any], measure: str) -> str:
    return row.get("undefined") or (CHANCE if measure == "accuracy" and at_chance(run) else "")


def fall(run: OpenRun) -> float:
    """By what share of its start fine-tuning lowered the loss on held-out problems."""
    log = json.loads((run.get("sft") / "training.json").read_text(encoding="utf-8"))
    return 1 - log["held_out_after"] / log["held_out_before"]


def _learned(run: OpenRun, every: bool) -> bool:
    siblings = [_with_seed(run, seed) for seed in run.other_seeds] if every else []
    return all(fall(one) >= SMALLEST_FALL for one in (run, *siblings))


def _with_seed(run: OpenRun, seed: int) -> OpenRun:
    return run.with_seed(seed)


def at_chance(run: OpenRun) -> bool:
    """Whether accuracy before training is within two standard errors of guessing, or below."""
    rows = run.get("evaluation_before")
    items = rows[rows["kind"] == "letter"].groupby("example_id")
    right_N = rows.loc[items["loglikelihood"].idxmax(), "is_right"].to_numpy(float)
    guess_N = 1 / items.size().to_numpy(float)
    return bool(right_N.mean() <= guess_N.mean() + 1.96 * math.sqrt((guess_N * (1 - guess_N)).sum()) / len(guess_N))


# --- the SAE ------------------------------------------------------------------------------------------------------

def sae_quality(run: OpenRun, field: str, stage: str = "sae_quality") -> Evidence:
    """Variance explained, share of the loss recovered, or share of latents that are silent on a token."""
    found = run.get(stage)
    value = {"explained": found["fraction_of_variance_explained"], "recovered": found["splice"]["recovered"],
             "silent": 1 - found["l0"] / found["latents"]}[field]
    return Evidence(value, n=found["tokens"] if field != "recovered" else found["splice"]["tokens"], of="tokens")


def wider(run: OpenRun) -> Evidence:
    """What the run's SAE explains of the variance less what the small one explains, on the same tokens."""
    own, small = (run.get(stage) for stage in ("sae_quality", "small_sae_quality"))
    return Evidence(own["fraction_of_variance_explained"] - small["fraction_of_variance_explained"],
                    n=own["tokens"], of="tokens")


# --- what fine-tuning shifts --------------------------------------------------------------------------------------

def _codes(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


def _count(run: OpenRun, kind: str) -> int:
    """The run's N, or the same fraction of another code."""
    width = {code: len(run.get("sft_shift")[f"{code}/squared_difference_L"]) for code in ("sae", kind)}
    return run.settings.top_n if kind == "sae" else same_fraction(run.settings.top_n, width["sae"], width[kind])


def _share(run: OpenRun, kind: str, count: int) -> tuple[Estimate, int]:
    found = concentrations(_codes(run.get("sft_shift"), kind)["fold_squared_difference_FL"], count,
                           seed=run.settings.seed)
    at = found.at(count)
    return Estimate(at["held_out"], at["low"], at["high"]), found.folds


def few_latents(run: OpenRun) -> Evidence:
    """Share of the change in the paper's fraction of latents, chosen on other questions (Figure 1a)."""
    width = len(run.get("sft_shift")["sae/squared_difference_L"])
    share, folds = _share(run, "sae", max(1, round(PAPER_FRACTION * width)))
    return _evidence(share, n=folds, of="groups of questions")


def beyond_activity(run: OpenRun) -> Evidence:
    """The same for the run's N, beside the share of the activity in the N most active latents."""
    count = run.settings.top_n
    share, folds = _share(run, "sae", count)
    active = concentration(run.get("sft_shift")["sae/base_square_sum_L"])[count - 1].item()
    return _evidence(share, n=folds, of="groups of questions", against={"share of the activity": Estimate(active)})


def raw_more_even(run: OpenRun) -> Evidence:
    """The SAE's share beside that of the same fraction of raw dimensions and of a random code (Figure 2b)."""
    (share, folds), *others = (_share(run, kind, _count(run, kind)) for kind in KINDS)
    return _evidence(share, n=folds, of="groups of questions", against=dict(zip(
        ("raw dimensions", "random sparse code"), (other for other, _ in others), strict=True)))


def zeroing(run: OpenRun) -> Evidence:
    """What zeroing the most shifted costs more than zeroing others, in bits per character (Figure 1b)."""
    rows, top_n = run.get("ablation"), run.settings.top_n
    count = min(sorted(rows.loc[rows["latents"] > 0, "latents"].unique()), key=lambda number: abs(number - top_n))
    bits = rows[(rows["latents"] == count) & rows["bits"].notna()]
    tables = {kind: own.pivot(index="draw", columns="example_id", values="bits") for kind, own in bits.groupby("kind")}
    others = {"random": "random latents", "matched": "others of as much energy", "like_rate": "others that fire as often"}
    if "matched" not in tables:
        others = {"most_active" if kind == "matched" else kind: "the most active latents" if kind == "matched" else name
                  for kind, name in others.items()}
    most = tables["most_shifted"].iloc[0]
    leads = {name: _of(crossed_mean_interval((most - tables[kind]).to_numpy(), against_one=True))
             for kind, name in others.items() if kind in tables}
    return _evidence(leads.pop("random latents"), n=len(most), of="problems", against=leads)


# --- what demonstrations foresee ----------------------------------------------------------------------------------

def _foreseen(run: OpenRun, kind: str) -> tuple[Sequence[float], float]:
    """For each set of demonstrations the share of the actual top N that it names, and what activity alone names."""
    goal, count, stats = _goal(run, kind), _count(run, kind), _codes(run.get("shift_by_draw"), kind)
    named = partial(_named, goal=goal, count=count)
    return ([named(change_L) for change_L in stats["squared_difference_RL"]],
            max(named(stats[name]) for name in ("base_fired_L", "base_square_sum_L")))


def _goal(run: OpenRun, kind: str = "sae") -> torch.Tensor:
    return shifted_dimensions(run.get("sft_shift")[f"{kind}/squared_difference_L"], _count(run, kind))


def _named(values_L: torch.Tensor, goal: torch.Tensor, count: int) -> float:
    return overlap(shifted_dimensions(values_L, count), goal) / count


def _lead(run: OpenRun, differences: Sequence[float]) -> Estimate:
    return _of(paired_mean_interval(differences, resamples=run.settings.bootstrap, seed=run.settings.seed))


def foreseen(run: OpenRun) -> Evidence:
    """Share of the actual top N among the N that demonstrations move most, and its lead over lists that need none."""
    count, stats = run.settings.top_n, _codes(run.get("shift_by_draw"), "sae")
    row = overlap_rows(run.get("shift")["squared_difference_L"], run.get("sft_shift")["sae/squared_difference_L"],
                       [count])[0]
    named = partial(_named, goal=_goal(run), count=count)
    sets = _foreseen(run, "sae")[0]
    other = run.get("shift_by_other_domain")["sae/squared_difference_RL"]
    lists = {"by firing rate": [named(stats["base_fired_L"])] * len(sets),
             "by energy": [named(stats["base_square_sum_L"])] * len(sets),
             "demonstrations of other domains": [named(other_L) for other_L in other]}
    return Evidence(row["share"], p=row["active_p"], n=len(sets), of="sets of demonstrations", against={
        f"more than {name}": _lead(run, [a - b for a, b in zip(sets, values, strict=True)])
        for name, values in lists.items()})


def better_than_raw(run: OpenRun) -> Evidence:
    """What demonstrations add to activity alone for latents, less what they add for other codes (Figure 2a)."""
    gain = {}
    for kind in KINDS:
        sets, alone = _foreseen(run, kind)
        gain[kind] = [share - alone for share in sets]
    leads = {kind: _lead(run, [a - b for a, b in zip(gain["sae"], gain[kind], strict=True)]) for kind in KINDS[1:]}
    return _evidence(leads["raw"], n=len(gain["sae"]), of="sets of demonstrations",
                     against={"more than a random code": leads["random"]})


def more_demonstrations(run: OpenRun) -> Evidence:
    """Share foreseen behind the most demonstrations less that behind the fewest."""
    by_number = {int(name.partition("/")[2]): values for name, values in run.get("shift_by_demonstrations").items()
                 if name.startswith("sae/")}
    named = partial(_named, goal=_goal(run), count=run.settings.top_n)
    few, many = by_number[min(by_number)], by_number[max(by_number)]
    gains = [named(after_L) - named(before_L) for after_L, before_L in zip(many, few, strict=True)]
    return _evidence(_lead(run, gains), n=len(gains), of="sets of demonstrations")


# --- the score ----------------------------------------------------------------------------------------------------

def correlation(run: OpenRun, measure: str, score: str, stage: str = "correlations", variant: str = "paper") -> Evidence:
    """r of a score with the absolute change of the domains, one seed (Figure 3)."""
    row = one(run.get(stage), measure=measure, variant=variant, score=score)
    return _evidence(_interval(row), n=row.get("n"), unable=_unable(run, row, measure))


def losses(run: OpenRun, measure: str = "accuracy") -> Evidence:
    """Share of domains that lost (Tables 2 to 4)."""
    shifts = run.get("domain_shift")
    own = shifts[shifts["measure"] == measure]
    if own.empty:
        raise NotDone(f"Not evaluated in this run: {measure}.")
    return Evidence(float((own["shift"] < 0).mean()), n=len(own), unable=_unable(run, {}, measure))


def published_losses(run: OpenRun) -> Evidence:
    """Share of the paper's domains and models that lost accuracy."""
    shifts = paper.accuracy_shifts()["shift_pct"]
    return Evidence(float((shifts < 0).mean()), n=len(shifts), of="domains of three models")


def published_correlations(run: OpenRun) -> Evidence:
    """The smallest of the paper's six correlations, recomputed from the points of Figure 3; the others beside it."""
    rows = paper.recomputed_correlations().sort_values("pearson").to_dict("records")
    found = {f"{row['model']}, {paper.METRICS[row['metric']]}":
             Estimate(row["pearson"], row["low"], row["high"], row["p"]) for row in rows}
    first, *others = found
    return _evidence(found[first], n=8, against={name: found[name] for name in others})


# --- baselines ----------------------------------------------------------------------------------------------------

def lead(run: OpenRun, measure: str, score: str, rivals: Sequence[str]) -> Evidence:
    """r of the score less r of each rival, from the same resamples, mean over seeds (Table 5)."""
    rows = run.get("baseline_correlations")
    own = one(rows, measure=measure, predictor=score)
    found = {}
    for rival in rivals:
        less = one(rows, measure=measure, predictor=rival).get("less", {}).get(score) or {}
        found[f"more than {rival}"] = _interval(less, "mean", "interval")
    first, *others = found
    return _evidence(found[first], n=own.get("n"), seeds=own.get("seeds", 1), unable=_unable(run, own, measure),
                     against={name: found[name] for name in others})


def choice(run: OpenRun, measure: str, score: str) -> Evidence:
    """r of the score, and the share of random sets of like firing rate and energy that reach it."""
    rows = {kind: one(run.get("baseline_nulls"), measure=measure, predictor=score, null=kind)
            for kind in ("rate", "energy")}
    undefined = next((row["undefined"] for row in rows.values() if "undefined" in row), "")
    if undefined:
        return Evidence(None, unable=undefined)
    fair = all(abs(row["matched"] - row["chosen"]) <= MATCH * row["chosen"] and row["shared"] <= SHARED
               for row in rows.values())
    return Evidence(rows["rate"]["observed"], n=rows["rate"]["draws"], of="random sets of a kind", fair=fair,
                    seeds=1 + len(run.other_seeds), unable=_unable(run, {}, measure), against={
                        f"sets of like {kind}": Estimate(row["mean"], row["low"], row["high"], row["p"])
                        for kind, row in rows.items()})


def probe(run: OpenRun, measure: str) -> Evidence:
    """r of what probes on raw and on SAE activations forecast, with p by shuffled targets (Table 13)."""
    rows = {kind: one(run.get("baseline_nulls"), measure=measure, predictor=f"probe_{kind}") for kind in ("raw", "sae")}
    if undefined := next((row["undefined"] for row in rows.values() if "undefined" in row), ""):
        return Evidence(None, unable=undefined)
    found = {kind: Estimate(row["observed"], p=row["p"]) for kind, row in rows.items()}
    return _evidence(found["raw"], n=rows["raw"]["draws"], of="shuffles", seeds=1 + len(run.other_seeds),
                     unable=_unable(run, {}, measure), against={"a probe on SAE activations": found["sae"]})


def beyond_hardness(run: OpenRun, measure: str, score: str, controls: Sequence[str]) -> Evidence:
    """Partial r of the score, given what is known of the domains without an SAE, mean over seeds."""
    row = one(run.get("baseline_confounds"), measure=measure, score=score, controls=list(controls))
    return _evidence(_interval(row), n=row.get("n"), seeds=row.get("seeds", 1), unable=_unable(run, row, measure))


# --- ablations ----------------------------------------------------------------------------------------------------

def ends(run: OpenRun, axis: str, measure: str, score: str) -> Evidence:
    """r at the first value of a setting less r at the last (Figures 4a, 4c, 4d)."""
    row = one(run.get("sweep_correlations")["claims"], axis=axis, measure=measure, score=score)
    interval = row.get("interval") or {}
    low, high = interval.get("high"), interval.get("low")
    return Evidence(-row["mean"], None if low is None else -low, None if high is None else -high, row["p"],
                    n=_domains(run, measure), unable=_unable(run, row, measure))


def _domains(run: OpenRun, measure: str) -> int:
    return run.get("sweep_correlations")["values"][0].get("n") or 0


def every_value(run: OpenRun, axis: str, measure: str, score: str) -> Evidence:
    """r at every value of a setting (Figure 4b)."""
    rows = [row for row in run.get("sweep_correlations")["values"]
            if (row["axis"], row["measure"], row["score"]) == (axis, measure, score)]
    if len(rows) < 2:
        raise NotDone(f"This run has no other values of {axis}.")
    found = {f"{axis} {row['value']}": _interval(row) for row in rows}
    first, *others = sorted(found, key=lambda name: found[name].value if found[name].value is not None else -math.inf)
    return _evidence(found[first], n=rows[0].get("n"), against={name: found[name] for name in others},
                     unable=_unable(run, rows[0], measure))


# --- training domains ---------------------------------------------------------------------------------------------

def training(run: OpenRun, training_set: str, measure: str, score: str) -> Evidence:
    """r of the score with the change that one training set causes (Table 1)."""
    row = one(run.get("training_correlations"), training_set=training_set, seed=run.settings.seed, measure=measure,
              variant="paper", score=score)
    return _evidence(_interval(row), n=row.get("n"),
                     unable=_unable(run, row, measure) or UNLEARNED * (training_set in _idle(run)))


def _idle(run: OpenRun) -> list[str]:
    sets = run.get("training_matrix")[["training_set", "seed", "loss_fall"]].drop_duplicates()
    return sets.loc[~(sets["loss_fall"] >= SMALLEST_FALL), "training_set"].unique().tolist()


def training_specific(run: OpenRun, measure: str, score: str) -> Evidence:
    """Mean rank correlation within domains, over training sets."""
    row = one(run.get("training_specificity"), measure=measure, forecast=score)
    main = Estimate(row.get("within"), row.get("low"), row.get("high"), row.get("p_within"))
    return _evidence(main, n=row.get("domains"), against={"whole sets shuffled": Estimate(None, p=row.get("p_sets"))},
                     unable=row.get("undefined") or UNLEARNED * bool(_idle(run)))


def own_lists(run: OpenRun) -> Evidence:
    """Lead of lists by demonstrations on their own training set's change, and what it is more than by firing rate."""
    from sts.stages.domains import beyond_rate

    found = run.get("training_overlap")
    own, beyond = found["lead"]["foreseen"], beyond_rate(found["rows"])
    sets = len({row["trained"] for row in found["rows"]})
    if "undefined" in own:
        return Evidence(None, unable=own["undefined"])
    return Evidence(own["lead"], p=own["p"], n=sets, of="training sets", unable=UNLEARNED * bool(_idle(run)),
                    against={"more than by firing rate": Estimate(beyond["lead"], p=beyond["p"])})


# --- costs --------------------------------------------------------------------------------------------------------

def cost_ratio(run: OpenRun) -> Evidence:
    """Fine-tuning and evaluation divided by the forecast, in seconds and in token-forward-passes, as measured."""
    groups = {"forecast": ("shift", "domain_stats"), "finding out": ("sft", "evaluation_before", "evaluation_after")}
    records = {name: [run.provenance(stage) for stage in stages] for name, stages in groups.items()}
    if not all(record for own in records.values() for record in own):
        raise NotDone("Not all stages that are compared are there.")
    seconds = {name: sum(record["seconds"] for record in own) for name, own in records.items()}
    work = [[(record.get("work") or {}).get("passes", 0) for record in own] for own in records.values()]
    passes = sum(work[1]) / sum(work[0]) if all(value for own in work for value in own) else None
    return Evidence(seconds["finding out"] / seconds["forecast"], n=1, of="measurement",
                    against={"token-forward-passes": Estimate(passes)})
