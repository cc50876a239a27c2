"""What the chapter on ablations says: its tables, and sentences with verdicts by rules fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas

from sts import learned, paper
from sts.pages import CORRELATION_RULE, p_phrase, p_value
from sts.pages_baselines import SCORE_NAMES, _range, _two, _verdict
from sts.pages_measures import NAMES, in_order
from sts.pipeline_sweeps import repeated
from sts.stages import OpenRun
from sts.sweeps import AXES, SCORES
from sts.verdicts import counted

SETTING_RULE = ("A value of a setting is **better** (or **worse**) than the run's own if the 95% interval of its "
                "r minus r of the run's own lies above (or below) zero, both taken from the same resamples; otherwise "
                "as **not told apart**. A setting **matters** if any of its other values is better or worse. As many "
                "values are compared, each p (by swapping the two scores within domains) is also corrected by Holm's "
                "method, over all values and both scores of a measure together.")
CLAIM_RULE = ("The paper's claims about rank, width and sparsity are judged at the two ends of the sweep, named "
              "beforehand: **held** if the 95% interval of r of the last value minus r of the first lies below zero; "
              "**reversed** if it lies above; otherwise **not shown**. *All layers predict* counts as **held** if the "
              "claim of positive correlation is held at every layer, otherwise as **not shown**.")
BEST_RULE = ("The best of all values is **no more than chance** unless at most 5% of shuffled orders of the domains "
             "give a best value as high, with the pick of the best made anew in every order.")
#: Sweeps that take more than stored sums: axes -> settings that ask for them.
FURTHER = {("demonstrations", "shift_demonstrations"): "`sweep_demonstrations`, `sweep_shift_demonstrations`",
           ("score_tokens", "shift_tokens"): "`sweep_tokens`, `sweep_shift_tokens`", ("masks",): "`sweep_masks`",
           ("width", "layer", "k"): "`sweep_widths`, `sweep_layers`, `sweep_k`"}


# --- the rules ----------------------------------------------------------------------------------------------------

def value_verdict(less: dict | None) -> str:
    """`SETTING_RULE` for one value, from its row's `less`."""
    if not less or less["interval"] is None:
        return "undefined"
    if less["interval"]["low"] > 0:
        return "better"
    return "worse" if less["interval"]["high"] < 0 else "not told apart"


def ends_verdict(claim: dict) -> str:
    """`CLAIM_RULE`, from a row of the `claims` of stage `sweep_correlations`."""
    return {"worse": "held", "better": "reversed", "not told apart": "not shown"}.get(value_verdict(claim), "undefined")


def layers_verdict(rows: list[dict]) -> str:
    """`CLAIM_RULE` for the layers, from their rows for one measure and score."""
    verdicts = [_verdict(row) for row in rows]
    if "undefined" in verdicts:
        return "undefined"
    return "held" if set(verdicts) == {"held"} else "not shown"


def best_verdict(best: dict) -> str:
    """`BEST_RULE`, from a row of the `best` of stage `sweep_correlations`."""
    return "more than chance" if best["p"] <= 0.05 else "no more than chance"


# --- rows ---------------------------------------------------------------------------------------------------------

def measures(run: OpenRun) -> list[str]:
    """Measures that were evaluated, the finest first (`pages_measures.ORDER`)."""
    return in_order(row["measure"] for row in run.get("sweep_correlations")["values"])


def rows_of(run: OpenRun, measure: str, **wanted) -> list[dict]:
    """Rows of the sweeps for a measure, of a score or axis if asked."""
    return [row for row in run.get("sweep_correlations")["values"]
            if row["measure"] == measure and all(row[name] == value for name, value in wanted.items())]


def axes_of(run: OpenRun) -> list[str]:
    """Settings that this run varies, in the order of the page."""
    found = {row["axis"] for row in run.get("sweep_correlations")["values"]}
    return [axis for axis in AXES if axis in found]


def title_of(axis: str) -> str:
    """What a figure calls a setting, with the paper's own figure."""
    return AXES[axis].label + (f" ({AXES[axis].figure})" if AXES[axis].figure else "")


def panels(run: OpenRun, measure: str) -> dict[str, list[dict]]:
    """What `plots_sweeps.sweeps` draws: for each setting the correlations of all values and both scores."""
    def line(row: dict) -> dict:
        interval = row.get("pearson_interval") or {}
        return {"score": row["score"], "value": row["value"], "own": row["own"], "r": row.get("pearson"),
                "low": interval.get("low"), "high": interval.get("high")}

    return {title_of(axis): [line(row) for row in rows_of(run, measure, axis=axis)] for axis in axes_of(run)}


def difference_lines(run: OpenRun, measure: str) -> list[dict]:
    """What `plots_sweeps.differences` draws: every value but the run's own."""
    lines = []
    for axis in axes_of(run):
        rows = [row for value in _values(run, axis) for row in rows_of(run, measure, axis=axis, value=value)]
        for row in (row for row in rows if not row["own"]):
            less = row.get("less") or {"mean": None, "interval": None}
            interval = less["interval"] or {}
            lines.append({"group": AXES[axis].label, "value": row["value"], "score": row["score"], "mean": less["mean"],
                          "low": interval.get("low"), "high": interval.get("high"),
                          "verdict": value_verdict(row.get("less"))})
    return lines


def _values(run: OpenRun, axis: str) -> list[str]:
    return list(dict.fromkeys(row["value"] for row in run.get("sweep_correlations")["values"] if row["axis"] == axis))


# --- tables -------------------------------------------------------------------------------------------------------

def values_table(run: OpenRun, measure: str) -> pandas.DataFrame:
    """One line a setting and value: for both scores r with interval, p, and what it changes against the run's own."""
    lines = []
    for axis in axes_of(run):
        for value in _values(run, axis):
            own = {row["score"]: row for row in rows_of(run, measure, axis=axis, value=value)}
            mark = " (own)" if own["sts_act"]["own"] else ""
            line = {"setting": AXES[axis].label, "value": value + mark}
            for score, name in SCORE_NAMES.items():
                line |= _columns(name, own[score])
            lines.append(line)
    return pandas.DataFrame(lines)


def _columns(name: str, row: dict) -> dict[str, str]:
    if row.get("pearson") is None:
        return {f"{name}: r (95% interval)": "undefined", f"{name}: p": "", f"{name}: less own": "",
                f"{name}: p, Holm": "", f"{name}: verdict": ""}
    less = row.get("less")
    return {f"{name}: r (95% interval)": f"{_two(row['pearson'])} ({_range(row['pearson_interval'])})",
            f"{name}: p": p_value(row["p"]),
            f"{name}: less own": f"{_signed(less['mean'])} ({_range(less['interval'])})" if less else "",
            f"{name}: p, Holm": p_value(less["p_holm"]) if less else "",
            f"{name}: verdict": value_verdict(less) if less else ""}


def _signed(value: float) -> str:
    """Two decimals with their sign, and never "-0.00"."""
    return f"{round(value, 2) + 0.0:+.2f}"


def claims_table(run: OpenRun) -> pandas.DataFrame:
    """The paper's claims of Figure 4a to d: the ends compared, by measure and score, with verdicts."""
    lines, claims = [], run.get("sweep_correlations")["claims"]
    for axis in (name for name in axes_of(run) if AXES[name].claim):
        for measure in measures(run):
            for score, name in SCORE_NAMES.items():
                line = {"the paper's claim": AXES[axis].claim, "in": AXES[axis].figure, "change in": NAMES[measure],
                        "score": name}
                own = [row for row in claims if (row["axis"], row["measure"], row["score"]) == (axis, measure, score)]
                if AXES[axis].ends and own:
                    claim = own[0]
                    line |= {"compared": f"{claim['last']} less {claim['first']}",
                             "r, difference": _signed(claim['mean']), "95% interval": _range(claim["interval"]),
                             "p": p_value(claim["p"]), "verdict": learned.judged(run, ends_verdict(claim))}
                elif AXES[axis].ends:
                    line |= {"compared": "ends", "r, difference": "undefined", "verdict": "undefined"}
                else:
                    rows = rows_of(run, measure, axis=axis, score=score)
                    held = [row["value"] for row in rows if _verdict(row) == "held"]
                    line |= {"compared": f"held at {len(held)} of {len(rows)}" + (
                        f": {', '.join(held)}" if held else ""), "verdict": learned.judged(run, layers_verdict(rows))}
                lines.append(line)
    return pandas.DataFrame(lines).fillna("")


def best_table(run: OpenRun) -> pandas.DataFrame:
    """The largest correlation of all values beside the largest that chance gives, by measure and score."""
    return pandas.DataFrame([{
        "change in": NAMES[best["measure"]], "score": SCORE_NAMES[best["score"]], "values tried": best["scores"],
        "best": f"{AXES[best['axis']].label}: {best['value']}", "its r": _two(best["pearson"]),
        "best by chance, mean": _two(best["chance_mean"]), "best by chance, top 5%": _two(best["chance_high"]),
        "a single value, top 5%": _two(best["single_high"]), "p": p_value(best["p"]), "verdict": best_verdict(best),
    } for measure in measures(run) for best in run.get("sweep_correlations")["best"] if best["measure"] == measure])


def sae_table(run: OpenRun) -> pandas.DataFrame | None:
    """The sweep's SAEs: width, layer, sparsity and quality on held-out text; None if this run trains none."""
    frame = run.get("sweep_saes")
    if frame.empty:
        return None
    frame = frame[frame["axis"].isin(("width", "layer", "k"))].drop_duplicates(["layer", "latents", "k"])
    return pandas.DataFrame({
        "layer": frame["layer"], "latents": frame["latents"].map("{:,}".format), "k": frame["k"],
        "L0 (active latents a token)": frame["l0"].map("{:.1f}".format),
        "fraction of variance explained": frame["explained"].map("{:.3f}".format),
        "silent latents": frame["silent"].map("{:.1%}".format)})


def sparsity_table(run: OpenRun) -> pandas.DataFrame | None:
    """The paper's Table 12 beside this run: L0 and r of each SAE; None if this run does not vary k."""
    if "k" not in axes_of(run):
        return None
    published = paper.published_table(12)
    lines = [{"SAE": "the paper's, Gemma-2-9B-it", "L0": row["quantity"].rsplit(" ", 1)[1],
              "STS": f"{row['value']:.2f}"} for row in published.to_dict("records") if " L0 " in row["quantity"]]
    l0 = run.get("sweep_saes").query("axis == 'k'").groupby("value")["l0"].first()
    for value in _values(run, "k"):
        line = {"SAE": f"this run's, k = {value}", "L0": f"{l0[value]:.1f}"}
        for measure in measures(run):
            for row in rows_of(run, measure, axis="k", value=value):
                line[f"{SCORE_NAMES[row['score']]}, {NAMES[measure]}"] = (
                    "undefined" if row.get("pearson") is None else _two(row["pearson"]))
        lines.append(line)
    return pandas.DataFrame(lines).fillna("")


# --- sentences ----------------------------------------------------------------------------------------------------

def difference_sentence(run: OpenRun, measure: str) -> str:
    """How many values are better or worse than the run's own, and what is left after Holm's correction."""
    rows = [row for row in rows_of(run, measure) if not row["own"]]
    verdicts = {id(row): value_verdict(row.get("less")) for row in rows}
    defined = [row for row in rows if verdicts[id(row)] != "undefined"]
    if not defined:
        return "no comparison is defined, as no correlation is."
    parts = []
    for score, name in SCORE_NAMES.items():
        own = [verdicts[id(row)] for row in defined if row["score"] == score]
        parts.append(f"{name}: {own.count('better')} of {len(own)} other values better, {own.count('worse')} worse, "
                     f"{own.count('not told apart')} not told apart")
    mattering = [axis for axis in axes_of(run) if any(
        verdicts[id(row)] in ("better", "worse") for row in defined if row["axis"] == axis)]
    left = [row for row in defined if row["less"]["p_holm"] < 0.05]
    matter = ", ".join(f"*{AXES[axis].label}*" for axis in mattering) or "none"
    chance = f"{0.05 * len(defined):.0f}"
    kept = "; ".join(f"{AXES[row['axis']].label} {row['value']} ({SCORE_NAMES[row['score']]}, "
                     f"{_signed(row['less']['mean'])})" for row in left)
    return (f"{'; '.join(parts)}. Settings that matter by the rule: {matter}. Of "
            f"{counted(len(defined), 'comparison')}, about {chance} would leave zero out by chance if none mattered; "
            f"after Holm's correction, left at the 5% level: {kept or 'none'}.")


def claims_sentence(run: OpenRun, measure: str) -> str:
    """The verdicts on the paper's claims in one measure."""
    table = claims_table(run)
    own = table[table["change in"] == NAMES[measure]]
    parts = []
    for claim, rows in own.groupby("the paper's claim", sort=False):
        said = ", ".join(f"{row['score']} **{row['verdict']}**" for row in rows.to_dict("records"))
        parts.append(f"*{claim}* ({rows['in'].iloc[0]}): {said}")
    return "; ".join(parts) + "."


def best_sentence(run: OpenRun, measure: str) -> str:
    """What the best of all values reaches, and what the best reaches by chance."""
    found = [row for row in run.get("sweep_correlations")["best"] if row["measure"] == measure]
    if not found:
        return "undefined, as no correlation is."
    return "; ".join(
        f"the best of {best['scores']} values for {SCORE_NAMES[best['score']]} is *{AXES[best['axis']].label}: "
        f"{best['value']}*, r = {_two(best['pearson'])}; with shuffled domains the best of as many reaches "
        f"{_two(best['chance_mean'])} on average and {_two(best['chance_high'])} or more in one order of twenty "
        f"(p {p_phrase(best['p'])}): **{best_verdict(best)}**" for best in found) + "."


def resolution_sentence(run: OpenRun, measure: str) -> str:
    """How small a difference this design can see: the width of the differences' intervals."""
    halves = [(row["less"]["interval"]["high"] - row["less"]["interval"]["low"]) / 2 for row in rows_of(run, measure)
              if row.get("less") and row["less"]["interval"]]
    alone = [(row["pearson_interval"]["high"] - row["pearson_interval"]["low"]) / 2 for row in rows_of(run, measure)
             if row.get("pearson_interval")]
    if not halves:
        return "undefined, as no correlation is."
    return (f"an interval of r alone reaches {np.median(alone):.2f} to either side (median over values and scores), "
            f"that of a difference {np.median(halves):.2f}. A setting that changes r by less than about that goes "
            "unseen here.")


def own_sentence(run: OpenRun) -> str:
    """Which values count as the run's own, and that its SAE is not that of the sweep."""
    settings = run.settings
    said = (f"The run's own: N = {settings.top_n}, {counted(settings.shift_demonstrations, 'demonstration')} before a "
            f"training question and {settings.demonstrations} before a domain's, the paper's formulas.")
    if run.get("sweep_saes").empty:
        return said
    return (f"{said} Every SAE of the sweep is trained alike, on {settings.sweep_text_tokens:,} tokens and "
            f"{settings.sweep_sae_samples:,} samples, and is compared with the one in the middle: layer "
            f"{settings.layer}, {settings.sae_latents:,} latents, k = {settings.sae_k}. The run's own SAE, which the "
            "other sweeps use, may be better trained.")


def missing_sentence(run: OpenRun) -> str:
    """Sweeps that this run leaves out, and the settings that ask for them; "" if it has all."""
    present = set(axes_of(run))
    absent = [(axes, names) for axes, names in FURTHER.items() if not present & set(axes)]
    if not absent:
        return ""
    listed = "; ".join(f"{', '.join(AXES[axis].label for axis in axes)} (settings {names})" for axes, names in absent)
    return (f"**Not in this run.** The sweeps above come from sums that were stored anyway. These would have to read "
            f"the domains again or train SAEs, and this run lists no values for them: {listed}.")


def by_measure(run: OpenRun, sentence: Callable[[OpenRun, str], str]) -> str:
    """One of the sentences above for every measure, as a Markdown list."""
    return "\n".join(f"- Change in {NAMES[measure]}: {sentence(run, measure)}" for measure in measures(run))


def summary(run: OpenRun) -> str:
    """First paragraph of the chapter: the rules, then which settings matter in this run."""
    first, settings = measures(run)[0], run.settings
    rows = rows_of(run, first)
    listed = "\n".join([
        f"- {_capital(learned.learned_sentence(run))}",
        f"- Which settings matter? {_capital(difference_sentence(run, first))}",
        f"- The paper's claims. {claims_sentence(run, first)}",
        f"- Would picking the best help? {_capital(best_sentence(run, first))}"])
    rules = "\n".join(f"- {rule}" for rule in (learned.RULE, CORRELATION_RULE, SETTING_RULE,
                                                     CLAIM_RULE, BEST_RULE))
    return (f"**The rules**, written before any result of the `full` run was seen.\n\n{rules}\n\n"
            f"**The answer of this run**, for the change in {NAMES[first]} on `{settings.model}`, fine-tuned on "
            f"`{settings.sft_data}` and tested on `{settings.domain_data}`: n = {rows[0]['n']} domains, "
            f"{_seeds(run)}, {counted(len(axes_of(run)), 'setting')} varied, "
            f"{1 + sum(not row['own'] for row in rows) // len(SCORES)} different values in all, the run's own among "
            f"them.\n\n{listed}")


def _seeds(run: OpenRun) -> str:
    """How many seeds the ablations rest on, and that the run has more of them if so."""
    used, whole = 1 + len(repeated(run).other_seeds), 1 + len(run.other_seeds)
    return counted(used, "seed") + (f" (of the run's {whole})" if used < whole else "")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
