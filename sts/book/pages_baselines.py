"""What the chapter on baselines says: its table, and sentences with verdicts by rules fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable

import pandas

from sts.book import learned
from sts.book.pages import CORRELATION_RULE, correlation_verdict, folded_rules, p_phrase, p_value
from sts.book.pages_measures import NAMES, ORDER, SCORE_NAMES, in_order
from sts.book.verdicts import counted
from sts.measure import paper
from sts.measure.baselines import PREDICTORS, RANDOM
from sts.measure.correlation import smallest_detectable_correlation
from sts.measure.resampling import needed_correlation
from sts.run.run import OpenRun
from sts.stages.comparison import SCORES, controls_of, first_controls_of

CONTROL_NAMES = {"base_bits": "bits before", "base_bits_answer": "bits per answer before",
                 "question_tokens": "length of the questions", "answer_shortness": "1 / length of the answers"}

BASELINE_RULE = ("The score counts as **better** than a baseline if the 95% interval of the difference of their "
                 "correlations, taken from the same resamples, lies above zero; as **worse** if it lies below; "
                 "otherwise as **not told apart** from it.")
#: Matched sets are a control if they come this near to the chosen latents' firing rate or energy.
MATCH = 0.1
#: Sets that share more of their latents than this are too few different ones for a p.
SHARED = 0.5
CHOICE_RULE = ("*The choice of latents matters* counts as **held** for a score if at most 5% of random sets of like "
               "firing rates, and at most 5% of sets of like energy, reach its correlation, which is above zero, and "
               f"these sets come within {MATCH:.0%} of the chosen latents' firing rate and energy; where they do not "
               "come that near, activity is not ruled out and the claim counts as **not shown** too, and where two of "
               f"them share more than {SHARED:.0%} of their latents as well, as they are then nearly one and the same "
               "set; otherwise as **not shown**.")
PROBE_RULE = ("*A probe forecasts the change* counts as **held** if at most 5% of shuffled targets give it a "
              "correlation as high; otherwise as **not shown**.")
CONFOUND_RULE = ("*The score says more than hardness and length* counts as **held** if the 95% interval of its partial "
                 "correlation, given the bits before, the length of the questions and that of the answers, lies above "
                 "zero and p is below 0.05; otherwise as **not shown**. The length of the answers was added to this "
                 "rule after the first results were seen, as it goes along with the change in bits; the verdict by the "
                 "rule without it stands beside each.")


# --- the rules ----------------------------------------------------------------------------------------------------

def comparison_verdict(difference: dict) -> str:
    """`BASELINE_RULE`, from a row's `less` for one score: mean and interval."""
    interval = difference["interval"]
    if interval is None:
        return "undefined"
    if interval["low"] > 0:
        return "better"
    return "worse" if interval["high"] < 0 else "not told apart"


def choice_verdict(nulls: list[dict]) -> str:
    """`CHOICE_RULE`, from the rows of stage `baseline_nulls` for one measure and score."""
    own = {row["null"]: row for row in nulls}
    if any("undefined" in own[kind] for kind in ("rate", "energy")):
        return "undefined"
    both = [own[kind] for kind in ("rate", "energy")]
    if max(row["p"] for row in both) > 0.05 or own["rate"]["observed"] <= 0:
        return "not shown"
    if any(abs(row["matched"] - row["chosen"]) > MATCH * row["chosen"] for row in both):
        return "not shown, as sets of one kind do not match"
    if any(row["shared"] > SHARED for row in both):
        return "not shown, as the sets of one kind are nearly the same"
    return "held"


def probe_verdict(null: dict) -> str:
    """`PROBE_RULE`, from a probe's row of stage `baseline_nulls`."""
    return "held" if null["p"] <= 0.05 else "not shown"


def confound_verdict(row: dict) -> str:
    """`CONFOUND_RULE`, from a row of stage `baseline_confounds`."""
    return "held" if _verdict(row) == "held" else "not shown" if "undefined" not in row else "undefined"


def _verdict(row: dict) -> str:
    """`pages.CORRELATION_RULE`; undefined as well where no interval exists."""
    return "undefined" if row.get("pearson_interval") is None else correlation_verdict(row)


# --- rows ---------------------------------------------------------------------------------------------------------

def measures(run: OpenRun) -> list[str]:
    """Measures that were evaluated, the finest first (`pages_measures.ORDER`)."""
    return in_order(row["measure"] for row in run.get("baseline_correlations"))


def correlations_of(run: OpenRun, measure: str) -> dict[str, dict]:
    """Rows of stage `baseline_correlations` for a measure, by predictor."""
    return {row["predictor"]: row for row in run.get("baseline_correlations") if row["measure"] == measure}


def _nulls(run: OpenRun, measure: str, predictor: str) -> list[dict]:
    return [row for row in run.get("baseline_nulls") if (row["measure"], row["predictor"]) == (measure, predictor)]


def rows_of(run: OpenRun, measure: str) -> list[dict]:
    """Every line of the table and of the forest plot: label, group, kind, r, low, high, p, row, null.

    Of random latents r, low and high are mean and central 95% of the sets, p the share that reaches the score's r, None
    where the sets are nearly the same (`SHARED`). Of probes low and high are the central 95% for shuffled targets, p
    the share that reaches the probe's r.
    """
    rows, found = [], correlations_of(run, measure)
    for name, predictor in PREDICTORS.items():
        row = found[name]
        line = {"label": predictor.label, "group": predictor.group, "predictor": name, "row": row, "null": {},
                "kind": "forecast" if predictor.forecast else "after", "r": row.get("pearson"), "p": row.get("p")}
        interval = row.get("pearson_interval") or {}
        if name.startswith("probe_"):
            own = _nulls(run, measure, name)
            interval = own[0] if own and "p" in own[0] else {}
            line |= {"kind": "probe", "null": interval, "p": interval.get("p")}
        rows.append(line | {"low": interval.get("low"), "high": interval.get("high")})
        if name != "all_icl":
            continue
        for kind, label in RANDOM.items():
            for score, score_name in SCORE_NAMES.items():
                null = next(row for row in _nulls(run, measure, score) if row["null"] == kind)
                rows.append({"label": f"{score_name}, {label}", "group": predictor.group, "kind": "random",
                             "predictor": f"{kind}_{score}", "row": {}, "null": null, "r": null.get("mean"),
                             "low": null.get("low"), "high": null.get("high"),
                             "p": null.get("p") if null.get("shared", 1) <= SHARED else None})
    return rows


def forest_panels(run: OpenRun) -> dict[str, list[dict]]:
    """Panels of the forest plot: the change in both kinds of bits and in accuracy, as far as they were evaluated."""
    return {f"absolute change in\n{NAMES[measure]}": rows_of(run, measure)
            for measure in measures(run) if measure in ORDER}


def needed(run: OpenRun) -> float | None:
    """The r that a single seed needs for p = 0.05; None with too few domains."""
    return next((row["needed"] for row in run.get("baseline_power") if "needed" in row), None)


# --- tables -------------------------------------------------------------------------------------------------------

def baseline_table(run: OpenRun, measure: str) -> pandas.DataFrame:
    """One line a predictor: r with interval, p, spread over seeds, and the score's r minus this one's."""
    lines = []
    for line in rows_of(run, measure):
        row = line["row"]
        text = {"group": line["group"], "forecast from": line["label"], "r": "undefined", "95% interval": "", "p": "",
                "r by seed": "", "Spearman": ""} | {f"{name} less this": "" for name in SCORE_NAMES.values()}
        if line["r"] is not None:
            text["r"] = f"{_two(line['r'])}" + (" (mean of sets)" if line["kind"] == "random" else "")
            text["95% interval"] = _range(line) if line["kind"] != "probe" else _range(row["pearson_interval"])
            text["p"] = "" if line["p"] is None else p_value(line["p"])
        if row.get("by_seed"):
            text["r by seed"] = ", ".join(f"{_two(value)}" for value in row["by_seed"])
            text["Spearman"] = f"{row['spearman']:.2f}"
            text |= {f"{SCORE_NAMES[score]} less this": f"{less['mean']:+.2f} ({_range(less['interval'])})"
                     for score, less in row.get("less", {}).items()}
        lines.append(text)
    return pandas.DataFrame(lines)


def _two(value: float) -> str:
    """Two decimals, and never "-0.00"."""
    return f"{round(value, 2) + 0.0:.2f}"


def _range(interval: dict | None) -> str:
    return "no interval" if not interval or interval.get("low") is None else (
        f"{_two(interval['low'])} to {_two(interval['high'])}")


def confound_table(run: OpenRun) -> pandas.DataFrame:
    """The score's correlation as it is and given hardness, lengths and all of these, in every measure."""
    lines = []
    for measure in measures(run):
        found = correlations_of(run, measure)
        own = [row for row in run.get("baseline_confounds") if row["measure"] == measure]
        for score, name in SCORE_NAMES.items():
            for controls, row in (("nothing", found[score]), *(
                    (", ".join(CONTROL_NAMES[one] for one in row["controls"]), row)
                    for row in own if row["score"] == score)):
                defined = row.get("pearson") is not None
                lines.append({
                    "change in": NAMES[measure], "score": name, "given": controls,
                    "r": f"{_two(row['pearson'])}" if defined else "undefined",
                    "95% interval": _range(row["pearson_interval"]) if defined else "",
                    "p": p_value(row["p"]) if defined else "",
                    "r by seed": ", ".join(f"{_two(value)}" for value in row["by_seed"]) if defined else ""})
    return pandas.DataFrame(lines)


#: Baselines of the paper's Tables 5 and 13: words that find the number -> (label, predictor here).
PAPER_ROWS = (("raw feature activations", "raw activations (Table 5)", "raw_act"),
              ("downstream and training domain", "likeness of domain and training data (Table 5)", "cosine_raw"),
              ("before and after SFT", "likeness of the model before and after (Table 5; needs training)",
               "change_cosine"),
              ("probe on raw", "probe on raw activations (Table 13)", "probe_raw"),
              ("probe on SAE", "probe on SAE activations (Table 13)", "probe_sae"),
              ("STS, pearson", "STS (Tables 5 and 13)", "sts_icl"))


def beside_paper_table(run: OpenRun) -> pandas.DataFrame:
    """The paper's Tables 5 and 13 beside this run's closest baselines, Pearson's r in every measure."""
    published = pandas.concat([paper.published_table(number) for number in (5, 13)])
    lines = []
    for words, label, predictor in PAPER_ROWS:
        value = published.loc[published["quantity"].str.contains(words, regex=False), "value"].iloc[0]
        line = {"baseline of the paper": label, "paper": f"{value:.2f}", "here": PREDICTORS[predictor].label}
        for measure in measures(run):
            r = correlations_of(run, measure)[predictor].get("pearson")
            line[f"this run, {NAMES[measure]}"] = "undefined" if r is None else _two(r)
        lines.append(line)
    return pandas.DataFrame(lines)


# --- sentences ----------------------------------------------------------------------------------------------------

def _judged(run: OpenRun, verdict: str) -> str:
    """The verdict, as everything here is averaged over seeds, if the run learned with all of them."""
    return learned.judged(run, verdict, every_seed=True)


def _said(run: OpenRun, row: dict) -> str:
    if row.get("pearson") is None:
        return f"undefined ({row['undefined'].rstrip('.')})"
    return (f"r = {_two(row['pearson'])} (95% interval {_range(row['pearson_interval'])}, p {p_phrase(row['p'])}): "
            f"**{_judged(run, _verdict(row))}**")


def _seeds(run: OpenRun) -> str:
    return counted(1 + len(run.other_seeds), "seed")


def score_sentence(run: OpenRun, measure: str) -> str:
    """The score's own correlation, mean over seeds."""
    found = correlations_of(run, measure)
    return (f"Change in {NAMES[measure]}, n = {found['sts_act']['n']} domains, {_seeds(run)}: " + "; ".join(
        f"{name} {_said(run, found[score])}" for score, name in SCORE_NAMES.items()) + ".")


def comparison_sentence(run: OpenRun, measure: str) -> str:
    """How many of the other forecasts each score beats, which of these tell the other way round, and the best."""
    found = correlations_of(run, measure)
    rivals = {name: row for name, row in found.items()
              if PREDICTORS[name].forecast and name not in SCORES and "less" in row}
    parts = []
    for score, label in SCORE_NAMES.items():
        verdicts = [comparison_verdict(row["less"][score]) for row in rivals.values() if score in row["less"]]
        if verdicts:
            told = (f"better than {verdicts.count('better')} of {len(verdicts)}, worse than "
                    f"{verdicts.count('worse')}, and not told apart from {verdicts.count('not told apart')}")
            parts.append(f"{label} is {_judged(run, told)}")
    if not parts:
        return f"In {NAMES[measure]} no comparison is defined."
    best = max(rivals, key=lambda name: rivals[name]["pearson"])
    row = rivals[best]
    return (f"Against the {len(rivals)} other forecasts that need no probe and no tuned model, in {len(parts)} "
            f"times {len(rivals)} comparisons that are not corrected for their number: {'; '.join(parts)}."
            f"{_reversed(rivals)} The largest correlation among them has *{PREDICTORS[best].label}*, r = "
            f"{_two(row['pearson'])} (95% interval {_range(row['pearson_interval'])}), the best of {len(rivals)} and "
            "for that reason too high.")


def _reversed(rivals: dict[str, dict]) -> str:
    """The rivals whose correlation is clearly negative: beaten, although they tell as much once the sign is known."""
    names = [f"*{PREDICTORS[name].label}* ({_two(row['pearson'])})" for name, row in rivals.items()
             if row["pearson_interval"] and row["pearson_interval"]["high"] < 0]
    if not names:
        return ""
    return (f" Among those beaten, {', '.join(names)} {'goes' if len(names) == 1 else 'go'} along with the change the "
            "other way round, which could not be known beforehand.")


def choice_sentence(run: OpenRun, measure: str) -> str:
    """Whether the latents that demonstrations shift do better than random ones."""
    parts = []
    for score, label in SCORE_NAMES.items():
        nulls = _nulls(run, measure, score)
        own = {row["null"]: row for row in nulls}
        if choice_verdict(nulls) == "undefined":
            parts.append(f"{label}: undefined")
            continue
        parts.append(f"{label} has r = {_two(own['rate']['observed'])}; sets of like firing rates have "
                     f"{_two(own['rate']['mean'])} on average ({own['rate']['p']:.0%} of them reach it), sets of like "
                     f"energy {_two(own['energy']['mean'])} ({own['energy']['p']:.0%}): "
                     f"**{_judged(run, choice_verdict(nulls))}**")
    return ". ".join(parts) + "."


def match_sentence(run: OpenRun) -> str:
    """How well random sets match the chosen latents: these may be more active than any others."""
    rows = {row["null"]: row for row in run.get("baseline_nulls") if row["null"] in ("rate", "energy")}
    parts = [f"the matched sets' mean {what} is {rows[kind]['matched'] / rows[kind]['chosen']:.0%} of that of the "
             f"chosen latents" for kind, what in (("rate", "firing rate"), ("energy", "energy"))
             if rows[kind]["chosen"] > 0]
    shared = " and ".join(f"{row['shared']:.0%} ({kind})" for kind, row in rows.items())
    return (f"{run.settings.baseline_draws} sets of {run.settings.top_n} latents of each kind. "
            + "; ".join(parts).capitalize() + ". Where that is far below 100%, too few other latents are as active, "
            f"and activity is not ruled out as the reason. Two sets share {shared} of their latents on average: where "
            f"that is more than {SHARED:.0%}, the sets are nearly one comparison however many there are, their spread "
            "says little, and no p is given.")


def probe_sentence(run: OpenRun, measure: str) -> str:
    """What the probes forecast, beside what shuffled targets give."""
    parts = []
    for features, label in (("raw", "raw activations"), ("sae", "SAE activations")):
        own = _nulls(run, measure, f"probe_{features}")
        if not own or "p" not in own[0]:
            parts.append(f"On {label}: undefined")
            continue
        null = own[0]
        parts.append(f"On {label}: r = {_two(null['observed'])}; with shuffled targets {_two(null['mean'])} on "
                     f"average (95% of them {_range(null)}), p {p_phrase(null['p'])}; out-of-sample R² "
                     f"{_two(null['r_squared'])}: **{_judged(run, probe_verdict(null))}**")
    return ". ".join(parts) + "."


def confound_sentence(run: OpenRun, measure: str) -> str:
    """What is left of the score once hardness and lengths are taken out."""
    own, first = ({row["score"]: row for row in run.get("baseline_confounds")
                   if (row["measure"], row["controls"]) == (measure, list(controls(measure)))}
                  for controls in (controls_of, first_controls_of))
    parts = []
    for score, label in SCORE_NAMES.items():
        said, before = _partial(run, own[score]), _partial(run, first[score])
        parts.append(f"{label} {said}; without the length of the answers {before}")
    return ". ".join(parts) + "."


def _partial(run: OpenRun, row: dict) -> str:
    return "undefined" if "undefined" in row else (
        f"partial r = {_two(row['pearson'])} (95% interval {_range(row['pearson_interval'])}, p "
        f"{p_phrase(row['p'])}): **{_judged(run, confound_verdict(row))}**")


def power_sentence(run: OpenRun, measure: str) -> str:
    """What correlation this design could have found at all."""
    row = next((row for row in run.get("baseline_power") if row["measure"] == measure), {"undefined": "not evaluated"})
    if "undefined" in row:
        return f"What this design could have found in {NAMES[measure]} is undefined: {row['undefined']}"
    ceiling = row["reliability"] ** 0.5
    sentence = (f"With {row['n']} domains, one seed needs r = {row['needed']:.2f} or more for p = 0.05, and a true "
                f"correlation of {row['detectable']:.2f} is found in {row['power']:.0%} of experiments (Fisher's z; in "
                f"simulated ones with a permutation test {row['simulated']:.0%}, and {row['false_alarms']:.1%} false "
                f"alarms without any correlation). Of the variance of the absolute changes in {NAMES[measure]}, "
                f"about {row['reliability']:.0%} is more than noise of the questions; no forecast can be expected to "
                f"correlate with them much beyond {ceiling:.2f}. ")
    if ceiling <= row["detectable"]:
        return sentence + "So here even a perfect forecast of the true changes might well be missed."
    return sentence + (f"So a forecast must correlate with the true changes at about "
                       f"{row['detectable'] / ceiling:.2f} to be found.{_partial_power(row, measure)}")


def _partial_power(row: dict, measure: str) -> str:
    """What a partial correlation must be to be found: each control costs one domain; "" with too few of them."""
    controls = len(controls_of(measure))
    left = row["n"] - controls
    if left < 5:
        return ""
    return (f" A partial correlation given {controls} controls is as uncertain as a correlation over {left} domains: "
            f"it needs {needed_correlation(left):.2f}, and a true one of "
            f"{smallest_detectable_correlation(left, power=row['power']):.2f} is found in {row['power']:.0%} of "
            "experiments (Fisher's z). A smaller one may well be there where it says *not shown*.")


def by_measure(run: OpenRun, sentence: Callable[[OpenRun, str], str]) -> str:
    """One of the sentences above for every measure, as a Markdown list."""
    return "\n".join(f"- Change in {NAMES[measure]}. {sentence(run, measure)}" for measure in measures(run))


def summary(run: OpenRun) -> str:
    """First paragraph of the chapter: what the score adds to simpler forecasts in this run."""
    first = measures(run)[0]
    told = learned.learned_sentence(run, every_seed=True)
    listed = "\n".join([
        f"- {told[0].upper()}{told[1:]}", f"- {score_sentence(run, first)}", f"- {comparison_sentence(run, first)}",
        *([f"- {score_sentence(run, 'bits_answer')} {comparison_sentence(run, 'bits_answer')}"]
          if {"bits", "bits_answer"} <= set(measures(run)) else []),
        f"- Does the choice of latents matter? {choice_sentence(run, first)}",
        f"- Does a probe forecast the change? {probe_sentence(run, first)}",
        f"- Does the score say more than hardness and length? {confound_sentence(run, first)}"])
    settings = run.settings
    rules = folded_rules(CORRELATION_RULE, f"{learned.RULE} {learned.EVERY_SEED_RULE}", BASELINE_RULE, CHOICE_RULE,
                         PROBE_RULE, CONFOUND_RULE)
    return (f"**The answer of this run.** On `{settings.model}`, fine-tuned on `{settings.sft_data}` and tested on "
            f"`{settings.domain_data}`:\n\n{listed}\n\nHere r is the mean over seeds, and the interval is over "
            f"questions, domains and seeds.\n\n{rules}")
