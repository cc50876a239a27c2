"""What a run has to say on each claim: functions of an open run, named by the records in book/claims.yaml."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sts.book.claims import NOT_DONE, Claim, Estimate, Evidence, NotDone
from sts.book.tables import rows_of, value_of
from sts.errors import StsError
from sts.measure import cost, paper
from sts.measure.items import MeanInterval, crossed_mean_interval, paired_mean_interval
from sts.measure.overlap import concentrations, overlap_rows, same_fraction
from sts.measure.score import concentration, overlap, shifted_dimensions
from sts.measure.training_sets import list_lead

if TYPE_CHECKING:
    from sts.run.run import OpenRun

#: The paper's N = 100 of 28,672 latents (its Qwen SAE), as a fraction.
PAPER_FRACTION = 100 / 28_672
#: Training taught something if the loss on held-out problems fell by this share of its start.
SMALLEST_FALL = 0.1
#: Random sets are a control if they come this near to the chosen latents' rate or energy, and share at most this.
MATCH, SHARED = 0.1, 0.5
#: Why a claim cannot be tested.
UNLEARNED = "training taught the model too little: the loss on held-out problems fell by less than a tenth"
CHANCE = "before training the model is right no more often than by chance"
CODES = {"sae": "SAE latents", "raw": "raw dimensions", "random": "random sparse code"}
OTHERS = {"matched": "others of as much energy", "most_active": "the most active latents",
          "like_rate": "others that fire as often"}


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

    def variant(self, **changes: Any) -> Stored:
        return Stored(self.run.variant(**changes))


def is_stored(run: OpenRun | Stored, stage: str) -> bool:
    """Whether the stage's result is there; nothing is computed."""
    try:
        return bool(run.stored(stage))
    except StsError:  # neither recorded nor the model and the data at hand
        return False


def weigh(run: OpenRun | Stored, claim: Claim) -> tuple[Evidence | None, str, str]:
    """The evidence on a claim, the verdict, and why there is none."""
    try:
        found: Evidence = globals()[claim.evidence](run, **claim.arguments)
        unable = found.unable or UNLEARNED * (not _learned(run, claim))
    except StsError as error:
        return None, NOT_DONE, str(error)
    return found, claim.judge(found, unable), unable


def _learned(run: OpenRun | Stored, claim: Claim) -> bool:
    """Whether training taught something: with the run's seed, with every seed, or on the training sets of the claim."""
    if claim.learned == "no":
        return True
    if claim.learned == "sets":
        sets, own = run.get("training_matrix"), claim.arguments.get("where", {}).get("training_set")
        return all(sets.loc[(sets["training_set"] == own) | (own is None), "loss_fall"] >= SMALLEST_FALL)
    others = run.other_seeds if claim.learned == "every" else ()
    logs = (json.loads((one.get("sft") / "training.json").read_text(encoding="utf-8"))
            for one in (run, *(run.variant(seed=seed) for seed in others)))
    return all(1 - log["held_out_after"] / log["held_out_before"] >= SMALLEST_FALL for log in logs)


def _at_chance(run: OpenRun | Stored) -> bool:
    """Whether accuracy before training is within 1.96 standard errors of guessing, or below."""
    rows = run.get("evaluation_before")
    items = rows[rows["kind"] == "letter"].groupby("example_id")
    right_N = rows.loc[items["loglikelihood"].idxmax(), "is_right"].to_numpy(float)
    guess_N = 1 / items.size().to_numpy(float)
    return bool(right_N.mean() <= guess_N.mean() + 1.96 * math.sqrt((guess_N * (1 - guess_N)).sum()) / len(guess_N))


# --- rows of stages -----------------------------------------------------------------------------------------------

def row(run: OpenRun | Stored, stage: str, where: Mapping[str, Any] = {}, *, under: str = "", value: str = "pearson",
        interval: str = "pearson_interval", p: str = "p", n: str = "n", of: str = "domains", sign: int = 1,
        against: Mapping[str, Mapping[str, Any]] = {}, each: str = "") -> Evidence:
    """A number with its interval from the row of a stage (of its part `under`) that has the fields `where`.

    Args:
        value, interval, p, n: fields; dots reach into dicts. A `sign` of -1 turns a difference round.
        against: name -> what differs in the row that the number is held against.
        each: how to call each row, if several are picked: the smallest number is judged, the others stand beside it.
    """
    found = paper.recomputed_correlations() if stage == "paper" else run.get(stage)
    rows = [one for one in rows_of(found[under] if under else found)
            if all(one.get(name) == wanted for name, wanted in where.items())]
    if not rows or (each and len(rows) < 2):
        raise NotDone(f"Not in stage {stage} of this run: {', '.join(map(str, where.values()))}.")
    numbers = [_estimate(one, value, interval, p, sign) for one in rows]
    first = min(range(len(rows)), key=lambda place: numbers[place].value or 0.0) if each else 0
    own: dict[str, Any] = {"stage": stage, "under": under, "value": value, "interval": interval, "p": p, "sign": sign}
    more: dict[str, Estimate] = {each.format(**one): number for one, number in zip(rows, numbers, strict=True)
                                 if each and one is not rows[first]}
    for name, change in against.items():
        other: dict[str, Any] = {**own, **change, "where": {**where, **change.get("where", {})}}
        more[name] = row(run, **other)
    unable = CHANCE * (where.get("measure") == "accuracy" and _at_chance(run)) or _affected(run, stage, where)
    count = value_of(rows[first], n) or (run.get("domain_shift")["domain"].nunique() if of == "domains" else None)
    return Evidence(**vars(numbers[first]), n=count, of=of, against=more,
                    seeds=value_of(rows[first], "seeds") or 1, unable=value_of(rows[first], "undefined") or unable)


def _affected(run: OpenRun | Stored, stage: str, where: Mapping[str, Any]) -> str:
    """Why a recorded result is known to be wrong, if these rows of it are."""
    noted = run.provenance(stage).get("affected", {}) if stage != "paper" else {}
    return noted.get("why", "") * (where.get("axis") in noted.get("axes", ()))


def _estimate(one: Mapping[str, Any], value: str, interval: str = "", p: str = "", sign: int = 1) -> Estimate:
    within = f"{interval}." if interval else ""
    number, low, high = (value_of(one, path) for path in (value, f"{within}low", f"{within}high"))
    if sign < 0:
        number, low, high = (None if end is None else -end for end in (number, high, low))
    return Estimate(number, low, high, value_of(one, p))


def choice(run: OpenRun | Stored, measure: str, score: str) -> Evidence:
    """r of the score, and the share of random sets of like firing rate and of like energy that reach it."""
    rows = {one["null"]: one for one in run.get("baseline_nulls") if one["null"] in ("rate", "energy")
            and (one["measure"], one["predictor"]) == (measure, score)}
    if not rows or any("undefined" in one for one in rows.values()):
        raise NotDone(f"Random sets of latents were not scored in {measure} in this run.")
    fair = all(abs(one["matched"] - one["chosen"]) <= MATCH * one["chosen"] and one["shared"] <= SHARED
               for one in rows.values())
    return Evidence(rows["rate"]["observed"], n=rows["rate"]["draws"], of="random sets of a kind", fair=fair,
                    seeds=1 + len(run.other_seeds),
                    against={f"sets of like {kind}": _estimate(one, "mean", p="p") for kind, one in rows.items()})


def losses(run: OpenRun | Stored, published: bool = False) -> Evidence:
    """Share of domains that lost accuracy (Tables 2 to 4), of the run or of the paper's three models."""
    changes = (paper.accuracy_shifts()["shift_pct"] if published else
               run.get("domain_shift").query("measure == 'accuracy'")["shift"])
    if changes.empty:
        raise NotDone("Accuracy was not evaluated in this run.")
    unable = CHANCE * (not published and _at_chance(run))
    return Evidence((changes < 0).to_numpy().mean().item(), n=len(changes), unable=unable)


def own_lists(run: OpenRun | Stored) -> Evidence:
    """Lead of lists by demonstrations on their own training set's change, and what it is more than by firing rate."""
    rows = run.get("training_overlap")["rows"]
    own, beyond = list_lead(rows, "foreseen"), list_lead(rows, "foreseen", "by_rate")
    return Evidence(**vars(_estimate(own, "lead", p="p")), n=len({one["trained"] for one in rows}), of="training sets",
                    unable=own.get("undefined", ""),
                    against={"more than by firing rate": _estimate(beyond, "lead", p="p")})


def cost_ratio(run: OpenRun | Stored) -> Evidence:
    """Fine-tuning and evaluation divided by the forecast, in seconds and in token-forward-passes, as measured."""
    sums = []
    for stages in (("shift", "domain_stats"), ("sft", "evaluation_before", "evaluation_after")):
        records = [run.provenance(stage) for stage in stages]
        if not all(records):
            raise NotDone("Not all stages that are compared are there.")
        passes = [(record.get("work") or {}).get("passes", 0) for record in records]
        sums.append((sum(record["seconds"] for record in records), sum(passes) if all(passes) else math.nan))
    seconds, passes = (rest / forecast for forecast, rest in zip(*sums, strict=True))
    return Evidence(seconds, n=1, of="measurement", against={
        "token-forward-passes": Estimate(None if math.isnan(passes) else passes)})


def planned_cost(run: OpenRun | Stored) -> Evidence:
    """The same in token-forward-passes on paper, for the paper's models; the smallest is judged."""
    (value, _), *more = sorted((cost.ratio(one, cost.Settings(), cost.Assumptions()), one.name)
                               for one in cost.ARCHITECTURES.values())
    return Evidence(value, n=1 + len(more), of="models", against={name: Estimate(ratio) for ratio, name in more})


def sae(run: OpenRun | Stored, field: str) -> Evidence:
    """Share of latents that are "silent" on a token; or what the SAE explains of the variance "more" than the small."""
    own, name = run.get("sae_quality"), "fraction_of_variance_explained"
    value = 1 - own["l0"] / own["latents"] if field == "silent" else own[name] - run.get("small_sae_quality")[name]
    return Evidence(value, n=own["tokens"], of="tokens")


# --- what fine-tuning shifts --------------------------------------------------------------------------------------

def shares(run: OpenRun | Stored, against: Sequence[str] = (), paper_fraction: bool = False) -> Evidence:
    """Share of the change in the N most shifted latents, chosen on other questions than measured on (Figures 1a, 2b).

    Args:
        against: other codes, at the same fraction; or "activity", the share of the activity in the N most active.
        paper_fraction: of as many latents as the paper's 100 of 28,672, in place of the run's N.
    """
    def share(code: str) -> Estimate:
        change_FL = moved[f"{code}/fold_squared_difference_FL"]
        count = max(1, round(PAPER_FRACTION * change_FL.shape[1])) if paper_fraction else _count(run, code)
        return _estimate(concentrations(change_FL, count, seed=run.settings.seed).at(count), "held_out")

    moved = run.get("sft_shift")
    active = concentration(moved["sae/base_square_sum_L"])[run.settings.top_n - 1].item()
    return Evidence(**vars(share("sae")), n=len(moved["sae/fold_squared_difference_FL"]), of="groups of questions",
                    against={CODES.get(code, code): Estimate(active) if code == "activity" else share(code)
                             for code in against})


def _count(run: OpenRun | Stored, code: str) -> int:
    """The run's N, or the same fraction of another code."""
    width = {kind: len(run.get("sft_shift")[f"{kind}/squared_difference_L"]) for kind in ("sae", code)}
    return same_fraction(run.settings.top_n, width["sae"], width[code])


def zeroing(run: OpenRun | Stored) -> Evidence:
    """What zeroing the most shifted costs more than zeroing others, in bits per character (Figure 1b)."""
    rows, top_n = run.get("ablation"), run.settings.top_n
    count = min(sorted(rows.loc[rows["latents"] > 0, "latents"].unique()), key=lambda number: abs(number - top_n))
    bits = rows[(rows["latents"] == count) & rows["bits"].notna()]
    tables = {kind: own.pivot(index="draw", columns="example_id", values="bits") for kind, own in bits.groupby("kind")}
    most = tables["most_shifted"].iloc[0]
    energy = "matched" if "matched" in tables else "most_active"
    leads = {name: _mean(crossed_mean_interval((most - tables[kind]).to_numpy(), against_one=True))
             for kind, name in {"random": "", energy: OTHERS[energy], "like_rate": OTHERS["like_rate"]}.items()
             if kind in tables}
    return Evidence(**vars(leads.pop("")), n=len(most), of="problems", against=leads)


def _mean(found: MeanInterval) -> Estimate:
    return _estimate(vars(found), "mean")


# --- what demonstrations foresee ----------------------------------------------------------------------------------

def _naming(run: OpenRun | Stored, code: str = "sae"):
    """A function: the share of the actual top N that the top N of some values per latent name."""
    count = _count(run, code)
    goal = shifted_dimensions(run.get("sft_shift")[f"{code}/squared_difference_L"], count)
    return lambda values_L: overlap(shifted_dimensions(values_L, count), goal) / count


def _lead(run: OpenRun | Stored, shares_R: Sequence[float], others_R: Sequence[float]) -> Estimate:
    differences = [own - other for own, other in zip(shares_R, others_R, strict=True)]
    return _mean(paired_mean_interval(differences, resamples=run.settings.bootstrap, seed=run.settings.seed))


def foreseen(run: OpenRun | Stored) -> Evidence:
    """Share of the actual top N among the N that demonstrations move most, and its lead over lists that need none."""
    named, stats = _naming(run), run.get("shift_by_draw")
    found = overlap_rows(run.get("shift")["squared_difference_L"], run.get("sft_shift")["sae/squared_difference_L"],
                         [run.settings.top_n])[0]
    sets = [named(own_L) for own_L in stats["sae/squared_difference_RL"]]
    others_RL = run.get("shift_by_other_domain")["sae/squared_difference_RL"]
    lists = {"by firing rate": [named(stats["sae/base_fired_L"])] * len(sets),
             "by energy": [named(stats["sae/base_square_sum_L"])] * len(sets),
             "demonstrations of other domains": [named(other_L) for other_L in others_RL]}
    return Evidence(found["share"], p=found["active_p"], n=len(sets), of="sets of demonstrations", against={
        f"more than {name}": _lead(run, sets, shares_R) for name, shares_R in lists.items()})


def better_than_raw(run: OpenRun | Stored) -> Evidence:
    """What demonstrations add to activity alone for latents, less what they add for other codes (Figure 2a)."""
    gain, stats = {}, run.get("shift_by_draw")
    for code in CODES:
        named = _naming(run, code)
        alone = max(named(stats[f"{code}/{name}"]) for name in ("base_fired_L", "base_square_sum_L"))
        gain[code] = [named(own_L) - alone for own_L in stats[f"{code}/squared_difference_RL"]]
    raw, random = (_lead(run, gain["sae"], gain[code]) for code in ("raw", "random"))
    return Evidence(**vars(raw), n=len(gain["sae"]), of="sets of demonstrations",
                    against={"more than a random code": random})


def more_demonstrations(run: OpenRun | Stored) -> Evidence:
    """Share foreseen behind the most demonstrations less that behind the fewest."""
    found = {int(name.partition("/")[2]): [*map(_naming(run), values_RL)]
             for name, values_RL in run.get("shift_by_demonstrations").items() if name.startswith("sae/")}
    return Evidence(**vars(_lead(run, found[max(found)], found[min(found)])), n=len(found[max(found)]),
                    of="sets of demonstrations")
