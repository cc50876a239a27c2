"""The chapter on costs, its measured part: tables and sentences made from what the stages recorded."""

from __future__ import annotations

import json
import math

import pandas

from sts.book.pages_plan import range_text
from sts.run.progress import duration
from sts.run.run import OpenRun

FORECAST, TRAINING, EVALUATION = "Forecast", "Fine-tuning", "Evaluation, before and after"
#: Groups of stages that are compared.
GROUPS = {FORECAST: ("shift", "domain_stats"), TRAINING: ("sft",),
          EVALUATION: ("evaluation_before", "evaluation_after")}
#: Stages that are shown beside them and counted in no total.
EXTRA = {"Official code's variant (not counted)": ("shift_rows", "domain_rows")}

#: Costs within this factor of each other count as about the same: a time varies by that much from run to run.
MARGIN = 1.25
COST_RULE = (f"The forecast counts as *cheaper* if finding out costs more than {MARGIN:g} times as much, both in "
             f"seconds and in token-forward-passes; as *dearer* if it costs less than {1 / MARGIN:g} times as much in "
             "both; otherwise as *about as costly*.")


# --- measured -----------------------------------------------------------------------------------------------------

def measured(run: OpenRun) -> pandas.DataFrame:
    """What each group of stages took when it was computed.

    Returns:
        One row per group: group, counted (in the totals), seconds, tokens and passes (NaN if the work of one of its
        stages was not recorded), uncounted (names of those stages), notes (of the stages, joined).
    """
    rows = []
    for group, stages in {**GROUPS, **EXTRA}.items():
        records = {name: run.computed(name) for name in stages}
        work = {name: record.get("work") or {} for name, record in records.items()}
        uncounted = [name for name, one in work.items() if not one.get("tokens")]
        rows.append({
            "group": group, "counted": group in GROUPS, "seconds": sum(one["seconds"] for one in records.values()),
            "tokens": math.nan if uncounted else sum(one["tokens"] for one in work.values()),
            "passes": math.nan if uncounted else sum(one["passes"] for one in work.values()),
            "uncounted": ", ".join(uncounted),
            "notes": " ".join(dict.fromkeys(note for one in work.values() for note in one.get("notes", ())))})
    return pandas.DataFrame(rows)


def ratios(costs: pandas.DataFrame) -> dict[str, float]:
    """Finding out (fine-tuning and evaluation) divided by the forecast, in "seconds" and in "passes"."""
    by_group = costs.set_index("group")
    return {unit: by_group.loc[[TRAINING, EVALUATION], unit].sum(skipna=False) / by_group.loc[FORECAST, unit]
            for unit in ("seconds", "passes")}


def cost_verdict(costs: pandas.DataFrame) -> str:
    """cheaper, dearer, about as costly or not counted, by `COST_RULE`."""
    values = ratios(costs).values()
    if any(math.isnan(value) for value in values):
        return "not counted"
    if min(values) > MARGIN:
        return "cheaper"
    return "dearer" if max(values) < 1 / MARGIN else "about as costly"


def cost_table(costs: pandas.DataFrame) -> pandas.DataFrame:
    """The measured costs as text: each group, its shares of the total, finding out together, and the ratio."""
    own, found = costs[costs["counted"]], costs[costs["group"].isin([TRAINING, EVALUATION])]
    total, ratio = own[["seconds", "passes"]].sum(skipna=False), ratios(costs)

    def row(label: str, values: pandas.Series, *, share: bool) -> dict[str, str]:
        shares = {unit: f"{values[unit] / total[unit]:.0%}" if share and values[unit] == values[unit] else ""
                  for unit in ("seconds", "passes")}
        return {"": label, "time": _time(values["seconds"]), "share of time": shares["seconds"],
                "tokens run": _count(values["tokens"]), "token-forward-passes": _count(values["passes"]),
                "share of passes": shares["passes"]}

    rows = [row(one["group"], one, share=True) for _, one in own.iterrows()]
    sums = found[["seconds", "tokens", "passes"]].sum(skipna=False)
    rows.append(row("Finding out: fine-tuning and evaluation", sums, share=True))
    rows.append({"": "Finding out, divided by forecast", "time": f"{ratio['seconds']:.1f}",
                 "token-forward-passes": _times(ratio["passes"])})
    rows += [row(one["group"], one, share=False) for _, one in costs[~costs["counted"]].iterrows()]
    return pandas.DataFrame(rows).fillna("")


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _count(value: float) -> str:
    return "not recorded" if math.isnan(value) else f"{value:,.0f}"


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}"


def cost_notes(run: OpenRun, costs: pandas.DataFrame) -> str:
    """What the seconds include, which counts are missing, and what the stages had to say."""
    missing = ", ".join(filter(None, costs["uncounted"]))
    notes = " ".join(dict.fromkeys(filter(None, costs["notes"])))
    lines = [f"Seconds are those of the machine that computed the stages ({run.provenance('shift')['device']}). They "
             "include loading a model or an SAE in the stage that loads it first, and leave out what a killed stage "
             "had done before it went on. Passes include padding, except in fine-tuning; tokens do not. "
             "Fine-tuning also scores the held-out examples before and after; these tokens count once, trained "
             "ones more."]
    if missing:
        lines.append(f"**Not recorded:** the work of {missing}. It was stored by a version of this book that did not "
                     "count; delete those files among the run's stages and run the chapter again.")
    return " ".join([*lines, notes]).strip()


def cost_summary(run: OpenRun, costs: pandas.DataFrame, varied: pandas.DataFrame, factor: float) -> str:
    """The chapter's first paragraph: which was cheaper in this run, with and without the SAE, and the factor on paper.

    Args:
        varied: as `cost.sensitivity(..., factor=factor)`.
    """
    ratio, by_group = ratios(costs), costs.set_index("group")
    forecast = by_group.loc[FORECAST]
    finding = by_group.loc[[TRAINING, EVALUATION]].sum(numeric_only=True, skipna=False)
    whole = varied[varied["assumption"] == "all"]
    if math.isnan(ratio["passes"]):
        took = (f"took {_time(forecast['seconds'])}; fine-tuning and evaluating took {_time(finding['seconds'])}, "
                f"{ratio['seconds']:.1f} times as long")
    else:
        took = (f"took {_time(forecast['seconds'])} and {_count(forecast['passes'])} token-forward-passes. Fine-tuning "
                f"and evaluating took {_time(finding['seconds'])} and {_count(finding['passes'])}: "
                f"{ratio['seconds']:.1f} times the seconds and {ratio['passes']:.1f} times the passes")
    return (
        f"**The answer of this run.** The forecast {took}. The forecast was **{cost_verdict(costs)}**. {COST_RULE} "
        f"Training the SAE is not included. {_paid_off(costs, sae_passes(run))}\n\n"
        "**On paper**, for the paper's three models with the paper's settings, finding out costs about "
        f"{range_text(whole, 'ratio', 'ratio', 'to')} times as many token-forward-passes as the forecast, the SAE "
        "again not included. That rests on numbers that the paper does not give; were all of them off at once, by "
        f"up to a factor of {factor:g}, the result would lie between {range_text(whole, 'low', 'high', 'and')}.")


def sae_passes(run: OpenRun) -> float:
    """Token-forward-passes of reading the text that the run's SAE was trained on, once; NaN if not recorded."""
    record, work = run.sae_folder and run.sae_folder / "training.json", run.provenance("shift").get("work") or {}
    if not record or not record.is_file() or not work.get("of_layers"):
        return math.nan
    return json.loads(record.read_text(encoding="utf-8"))["tokens"] * (run.settings.layer + 1) / work["of_layers"]


def _paid_off(costs: pandas.DataFrame, sae: float) -> str:
    """From which forecast on an SAE made for the purpose is worth its passes."""
    passes = costs.set_index("group")["passes"]
    saved = passes[TRAINING] + passes[EVALUATION] - passes[FORECAST]
    if math.isnan(sae + saved):
        return "What it cost is not recorded."
    if saved <= 0:
        return "With it, forecasting never pays here."
    first = math.floor(sae / saved) + 1
    which = f"forecast number {first} on" if first > 1 else "the first forecast on"
    return f"If it had to be made first, forecasting would pay from {which}."


def sae_cost_sentence(run: OpenRun, costs: pandas.DataFrame) -> str:
    """What the SAE cost, if that is recorded with it, in forecasts, and when that has paid off."""
    passes, forecast = sae_passes(run), costs.set_index("group").loc[FORECAST, "passes"]
    if math.isnan(passes + forecast):
        return f"What the run's SAE (`{run.settings.sae}`) cost is not recorded."
    return (f"Reading the text that the run's SAE was trained on takes {passes:,.0f} token-forward-passes, as much as "
            f"{passes / forecast:.1f} forecasts; training on the activations comes on top. {_paid_off(costs, passes)}")


# --- where it is saved --------------------------------------------------------------------------------------------

def savings(run: OpenRun) -> pandas.DataFrame:
    """What the engine ran against what whole prompts through all layers, with latents as matrices, would have taken.

    Returns:
        Rows "shifted dimensions", "domains" and "together"; columns whole_tokens (of all prompts), tokens,
        padded_tokens, passes, depth (share of the layers run), matrices_mb (float32 latents of the counted tokens, on
        both sides), sums_mb (what is kept). NaN where the work was not recorded.
    """
    whole, sums, rows = run.get("forecast_tokens"), run.get("forecast_sums"), {}
    for label, stage in (("shifted dimensions", "shift"), ("domains", "domain_stats")):
        own, work = sums[stage], run.computed(stage).get("work") or {}
        rows[label] = {
            "whole_tokens": whole[stage]["tokens"], "matrices_mb": 2 * own["tokens"] * own["latents"] * 4 / 1e6,
            "sums_mb": own["bytes"] / 1e6,
            **{name: work.get(name, math.nan) for name in ("tokens", "padded_tokens", "passes")}}
    frame = pandas.DataFrame(rows).T
    frame.loc["together"] = frame.sum(skipna=False)
    return frame.assign(depth=frame["passes"] / frame["padded_tokens"])


def savings_table(saved: pandas.DataFrame) -> pandas.DataFrame:
    """`savings` as text, one column a part of the forecast."""
    lines = {
        "tokens of all prompts, each run whole": saved["whole_tokens"].map(_count),
        "tokens run": saved["tokens"].map(_count), "with padding": saved["padded_tokens"].map(_count),
        "share of the layers run": saved["depth"].map("{:.0%}".format),
        "token-forward-passes": saved["passes"].map(_count),
        "passes saved, as a factor": (saved["whole_tokens"] / saved["passes"]).map(_times),
        "latents as matrices (MB)": saved["matrices_mb"].map(_megabytes),
        "sums kept (MB)": saved["sums_mb"].map(_megabytes),
    }
    return pandas.DataFrame(lines).T.rename_axis("").reset_index()


def _megabytes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def savings_sentence(saved: pandas.DataFrame) -> str:
    """The savings in words, each as a factor."""
    both = saved.loc["together"]
    if math.isnan(both["passes"]):
        return "The work of a stage was not recorded, so the savings in passes cannot be told."
    return (f"In this run, running shared tokens once saves a factor of {both['whole_tokens'] / both['tokens']:.1f}, "
            f"and leaving early a factor of {1 / both['depth']:.2f}; padding gives back "
            f"{both['padded_tokens'] / both['tokens'] - 1:.0%}. Together the forecast takes "
            f"{both['whole_tokens'] / both['passes']:.1f} times fewer token-forward-passes than whole prompts through "
            f"all layers. Matrices of latents would fill {_megabytes(both['matrices_mb'])} MB; the "
            f"sums take {_megabytes(both['sums_mb'])} MB.")
