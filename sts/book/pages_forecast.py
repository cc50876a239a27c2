"""What the chapter on the score says: whether the forecast came true, and what else forecasts as well."""

from __future__ import annotations

import pandas

from sts.book import learned
from sts.book.pages import CORRELATION_RULE, correlation_verdict, folded_rules, p_phrase
from sts.book.pages_baselines import BASELINE_RULE, CONTROL_NAMES, SCORE_NAMES, _range, comparison_verdict
from sts.book.pages_limits import clear_domains, limits_sentence, power_sentence
from sts.book.pages_measures import ACCURACIES, NAMES, measures_shown, p_value
from sts.book.verdicts import counted
from sts.data.prompts import OPENING
from sts.data.sources import MATHEMATICS
from sts.measure.paper import published_correlations
from sts.run.run import OpenRun
from sts.stages.answers import PARTS, RIVALS


def _find(run: OpenRun, measure: str, score: str, variant: str = "paper") -> dict:
    return next((row for row in run.get("correlations")
                 if (row["measure"], row["variant"], row["score"]) == (measure, variant, score)),
                {"undefined": "not evaluated; see the setting eval_kinds"})


def _said(run: OpenRun, result: dict) -> str:
    if "undefined" in result:
        return f"undefined ({result['undefined']})"
    interval, p = result["pearson_interval"], p_value(result["p"])
    verdict = learned.judged(run, correlation_verdict(result))
    return (f"r = {result['pearson']:.2f} (95% interval {interval['low']:.2f} to {interval['high']:.2f}, permutation "
            f"p {p if p.startswith('<') else '= ' + p}, n = {result['n']} domains): **{verdict}**")


def hardness_sentence(run: OpenRun, measure: str) -> str:
    """Whether a domain's bits before training forecast as much as the score; "" where they were not evaluated.

    Args:
        measure: `bits` or `bits_answer`; for another one there is no such sentence.

    Said on the same page as the score's own correlation: without it, a score that follows hardness looks like more.
    """
    row = next((row for row in run.get("hardness") if row["measure"] == measure), None)
    if row is None:
        return ""
    start = (f"**Does hardness do as well?** How many {NAMES[measure]} a domain's answers take *before* training "
             f"needs no SAE. Against the absolute change in {NAMES[measure]} it has ")
    if "undefined" in row:
        return f"{start}no correlation that is defined ({row['undefined']})."
    parts = []
    for score, label in SCORE_NAMES.items():
        found = row["scores"][score]
        less, left = found["less"], found["left"]
        said = (f"r = {found['pearson']:.2f} (difference {less['mean']:+.2f}, {_range(less['interval'])}: "
                f"**{learned.judged(run, comparison_verdict(less))}**)")
        if "undefined" in left:
            parts.append(f"{label} has {said}; its partial r given these bits is undefined ({left['undefined']})")
            continue
        interval, verdict = left["pearson_interval"], learned.judged(run, correlation_verdict(left))
        parts.append(f"{label} has {said}; given these bits, its partial r is {left['pearson']:.2f} "
                     f"({_range(interval)}, p {p_phrase(left['p'])}): **{verdict}**")
    return (f"{start}r = {row['pearson']:.2f} ({_range(row['pearson_interval'])}). {'. '.join(parts)} (95% intervals "
            f"over questions and domains, n = {row['n']} domains, seed {row['seed']}; by the rules below). "
            "[Baselines](baselines.ipynb) averages over seeds and has the other rivals.")


def length_sentence(run: OpenRun) -> str:
    """How much of bits per character is the answers' length, and what is left per whole answer; "" without bits."""
    rows = {row["measure"]: row for row in run.get("hardness")}
    own, whole = rows.get("bits", {}).get("answers"), rows.get("bits_answer", {"undefined": ""})
    if own is None or own["shortness"] is None or "undefined" in whole:
        return ""
    of = {label: whole["scores"][score] for score, label in SCORE_NAMES.items()} | {"the bits before training": whole}
    found = [f"{row['pearson']:.2f} ({_range(row['pearson_interval'])}) for {label}" for label, row in of.items()]
    return ("**What is scored, and how long it is.** The right answer, with its worked solution where the item has "
            f"one: {own['characters_low']:.0f} to {own['characters_high']:.0f} characters (median, by domain). The "
            f"shorter it is, the more each of its bits weighs: the mean of 1 / characters alone has r = "
            f"{own['shortness']:.2f} with the absolute change in bits per character. Counted per whole answer instead, "
            f"r is {', '.join(found[:-1])} and {found[-1]} (95% intervals over questions and domains, n = "
            f"{whole['n']} domains, seed {whole['seed']}).")


def parts_sentence(run: OpenRun) -> str:
    """Which part of the scored answers changed; "" where no opening words were scored."""
    rows = {row["part"]: row for row in run.get("answer_parts")}
    if not rows:
        return ""
    whole, changes = rows["whole"], [f"{PARTS[part]} {rows[part]['change']:+.2f}" for part in PARTS]
    letter, opening, seeds = rows["letter"], rows["opening"], counted(whole["seeds"], "seed")
    wrong = letter["wrong"]
    sentence = (f"**Which part of the answer changed?** Every scored sentence opens with *{OPENING}*. On "
                f"{whole['questions']} questions a domain, the bits of an answer changed by {whole['change']:+.2f} "
                f"(mean over {whole['n']} domains and {seeds}): {', '.join(changes)}. The right letter became more "
                f"likely in {letter['n'] - letter['rose']} of {letter['n']} domains; the wrong letters changed by "
                f"{wrong['change']:+.2f} bits and became more likely in {letter['n'] - wrong['rose']}. ")
    if abs(opening["change"]) > abs(whole["change"]) / 2:
        finds = "less" if opening["change"] > 0 else "more"
        sentence += ("So most of the change in bits, per character and per answer, is that the tuned model finds "
                     f"these words {finds} likely, and says little of what it knows of a domain. ")
    if opening["share"] is not None:
        shares = ", ".join(f"{PARTS[part]} {rows[part]['share']:.0%}" for part in PARTS)
        sentence += (f"Of how domains differ in the whole change (variance over domains), these parts make: {shares}; "
                     "this describes the domains at hand and has no interval. ")
        if opening["share"] > 0.5:
            sentence += ("So which of these domains moved most is mostly a matter of how likely the tuned model "
                         "finds the same few words after its questions. ")
    told = [f"{label} " + ", ".join(_r(rows[part]["scores"][score]) for part in PARTS)
            for score, label in SCORE_NAMES.items()]
    rivals = [f"{CONTROL_NAMES[name]} {_r(opening['rivals'][name])}" for name in RIVALS]
    left = [f"{label} {_r(opening['left'][score], p=True)}" for score, label in SCORE_NAMES.items()]
    return (f"{sentence}Against the absolute change of these three parts in turn, r is: {'; '.join(told)} (95% "
            f"intervals over questions, domains and seeds). Against that of the opening words, which are as long in "
            f"every domain: {'; '.join(rivals)}; and given these and the length of the questions, the partial r is "
            f"{'; '.join(left)}.")


def _r(row: dict, *, p: bool = False) -> str:
    """A correlation with its interval, and with its p if asked for."""
    if row.get("pearson") is None:
        return "undefined"
    return f"{row['pearson']:.2f} ({_range(row['pearson_interval'])}" + (f", p {p_phrase(row['p'])})" if p else ")")


def parts_table(run: OpenRun) -> pandas.DataFrame:
    """Stage `answer_parts`, one line a part of the answers and the whole; empty where no opening words were scored."""
    lines = []
    for row in run.get("answer_parts"):
        line = {"part of the answer": PARTS.get(row["part"], "the whole answer"), "bits before": f"{row['before']:.2f}",
                "mean change": f"{row['change']:+.2f}", "domains in which it rose": f"{row['rose']} of {row['n']}"}
        line["share of the variance over domains"] = "" if row["share"] is None else f"{row['share']:.0%}"
        line |= {f"r of {label} with the absolute change": _r(row["scores"][score], p=True)
                 for score, label in SCORE_NAMES.items()}
        line |= {f"r of {CONTROL_NAMES[name]}": _r(row["rivals"][name], p=True) for name in RIVALS}
        line |= {f"{label}, given these and the length of the questions": _r(row["left"][score], p=True)
                 for score, label in SCORE_NAMES.items()}
        lines.append(line)
    return pandas.DataFrame(lines)


def forecast_line(run: OpenRun, measure: str) -> str:
    """How both scores correlate with the change in a measure, with the verdicts."""
    name = NAMES[measure] + (", the kind of measure that the paper uses" if measure in ACCURACIES else "")
    return (f"change in {name}: STS_act {_said(run, _find(run, measure, 'sts_act'))}; STS_ICL "
            f"{_said(run, _find(run, measure, 'sts_icl'))}.")


def forecast_summary(run: OpenRun) -> str:
    """The chapter's first paragraph: whether the paper's central claim held in this run."""
    finest, _, accuracy = measures_shown(run.get("domain_shift"))
    settings, published = run.settings, published_correlations()["pearson"]
    told, shown = learned.learned_sentence(run), [measure for measure in (finest, accuracy) if measure]
    lines = "\n".join(f"- {line[0].upper()}{line[1:]}"
                      for line in (told, *(forecast_line(run, measure) for measure in shown)))
    if not {finest, accuracy} & set(ACCURACIES):
        lines += "\n- Change in accuracy, the kind of measure that the paper uses: not evaluated (`eval_kinds`)."
    missed = [measure for measure in shown if any(
        learned.judged(run, correlation_verdict(_find(run, measure, score))) != "held"
        for score in ("sts_act", "sts_icl"))]
    if hard := hardness_sentence(run, finest):
        lines += f"\n- {hard}"
    if finest == "bits" and (length := length_sentence(run)):
        lines += f"\n- {length}"
    if finest == "bits" and (parts := parts_sentence(run)):
        lines += f"\n- {parts}"
    if missed:
        lines += f"\n- {limits_sentence(run, *missed)}"
    return (
        "**The answer of this run.** The paper claims that the score correlates with the absolute change of a domain. "
        f"On `{settings.model}`, fine-tuned on `{settings.sft_data}` and tested on `{settings.domain_data}`:\n\n"
        f"{lines}\n\n"
        f"{folded_rules(learned.RULE, CORRELATION_RULE, BASELINE_RULE)}\n\n{_multiplicity(run)} The intervals of the "
        "first lines resample domains alone. The chapter on baselines resamples the questions within them as well and "
        f"averages over seeds; where the two differ, trust that one. Seed {settings.seed}, one training run. For "
        f"comparison, the paper reports {published.min():.2f} to {published.max():.2f} on eight selected domains of "
        "three models.")


def _multiplicity(run: OpenRun) -> str:
    """How many correlations were tested, and the smallest p once corrected for that."""
    tested = [row["p"] for row in run.get("correlations") if "undefined" not in row]
    if not tested:
        return ""
    # Holm's method multiplies the smallest p by the number of tests.
    smallest = min(1.0, min(tested) * len(tested))
    measures = len({row["measure"] for row in run.get("correlations")})
    return (f"The page tests {len(tested)} correlations (two scores, two variants, {measures} measures). Corrected for "
            f"that by Holm's method, the smallest p of all is {p_value(smallest)}; a single *held* is a hint, not a "
            "proof.")


def _trained_domains(run: OpenRun) -> set[str]:
    """Domains of the training set; known without reading it where it is mathematics alone."""
    if set(run.settings.sft_data.split("+")) <= MATHEMATICS:
        return {"math"}
    return {example.domain for example in run.sft_examples("train")}


def forecast_conclusion(run: OpenRun) -> str:
    """What the scatter shows, how sure we are, and what this design could have seen at all."""
    from sts.measure.correlation import pearson

    shifts = run.get("domain_shift")
    domains = shifts["domain"].nunique()
    lines = []
    for measure, label in NAMES.items():
        own = shifts[shifts["measure"] == measure]
        if own.empty:
            continue
        up = (own["shift"] > 0).sum()
        clear = len(clear_domains(shifts, measure))
        lines.append(f"- {label}: {clear} of {len(own)} domains moved by more than their interval's noise; {up} went "
                     f"up, {(own['shift'] < 0).sum()} down. Against the absolute change: STS_act "
                     f"{_said(run, _find(run, measure, 'sts_act'))}; STS_ICL "
                     f"{_said(run, _find(run, measure, 'sts_icl'))}.")
    trained = _trained_domains(run) & set(shifts["domain"])
    finest = measures_shown(shifts)[0]
    moved = shifts[shifts["measure"] == finest].set_index("domain")["shift"].abs().drop(
        index=list(trained), errors="ignore")
    if trained and len(moved) > 3 and moved.nunique() > 1:
        own = run.get("scores").query("variant == 'paper'").set_index("domain").loc[moved.index]
        lines.append(f"- The domain trained on ({', '.join(sorted(trained))}) is one of the points. Without it, the "
                     f"correlation with the change in {NAMES[finest]} is {pearson(own['sts_act'], moved):.2f} for "
                     f"STS_act and {pearson(own['sts_icl'], moved):.2f} for STS_ICL (n = {len(moved)}).")
    if domains < 4:
        return "\n".join([*lines, f"- {domains} domains are too few for any statement about correlation."])
    lines.append(f"- {power_sentence(domains)}. A result of *not shown* is therefore weak evidence against the claim, "
                 f"and the smallest domain has {int(shifts['n'].min())} questions.")
    return "\n".join(lines)
