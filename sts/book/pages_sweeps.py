"""What the chapter on ablations says: sentences with verdicts by `verdicts_sweeps`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sts.book import learned
from sts.book.pages import CORRELATION_RULE, folded_rules, p_phrase
from sts.book.pages_baselines import SCORE_NAMES, _range, _two
from sts.book.pages_measures import NAMES
from sts.book.tables_sweeps import (
    ALIKE,
    axes_of,
    claims_table,
    measures,
    own_training,
    rows_of,
    same_shape,
    signed,
    varied,
)
from sts.book.verdicts import counted
from sts.book.verdicts_sweeps import (
    BEST_RULE,
    CLAIM_RULE,
    FIXED_RULE,
    ONE_A_VALUE,
    SETTING_RULE,
    best_verdict,
    value_verdict,
)
from sts.measure.sweeps import AXES, SAE_AXES, SCORES
from sts.run.run import OpenRun
from sts.stages.sweeps import repeated

#: Axes that take more than stored sums -> the setting that asks for them.
FURTHER = {"demonstrations": "sweep_demonstrations", "shift_demonstrations": "sweep_shift_demonstrations",
           "score_tokens": "sweep_tokens", "shift_tokens": "sweep_shift_tokens", "masks": "sweep_masks",
           "width": "sweep_widths", "layer": "sweep_layers", "k": "sweep_k"}


# --- which settings matter ----------------------------------------------------------------------------------------

def _others(run: OpenRun, measure: str) -> list[tuple[dict, str]]:
    """Rows of values other than the run's own with their verdicts, where one is defined."""
    rows = [(row, value_verdict(row.get("less"))) for row in rows_of(run, measure) if not row["own"]]
    return [(row, verdict) for row, verdict in rows if verdict != "undefined"]


def difference_sentence(run: OpenRun, measure: str) -> str:
    """How many values are better or worse than the run's own, which give the same, and which settings matter."""
    others = _others(run, measure)
    if not others:
        return "no comparison is defined, as no correlation is."
    parts = []
    for score, name in SCORE_NAMES.items():
        own = [verdict for row, verdict in others if row["score"] == score and verdict != "the same"]
        same = [row for row, verdict in others if row["score"] == score and verdict == "the same"]
        parts.append(f"{name}: {own.count('better')} of {len(own)} other values better, {own.count('worse')} worse, "
                     f"{own.count('not told apart')} not told apart" + (
                         f" ({counted(len(same), 'more value')} left out, the same by definition or in fact: "
                         f"{_places(same)})" if same else ""))
    tested = sum(verdict != "the same" for _, verdict in others)
    return (f"{'; '.join(parts)}. Of {counted(tested, 'comparison')} of scores that differ, nominally about "
            f"{0.05 * tested:.0f} would leave zero out by chance if none mattered; but bootstrap intervals at "
            f"n = {others[0][0]['n']} need not cover at their level, and all comparisons share the same changes. "
            f"{_capital(matter_sentence(run, measure))}")


def _places(rows: list[dict]) -> str:
    """Settings with their values: "layer 7, 14; tokens a domain 1,000"."""
    by_axis: dict[str, list[str]] = {}
    for row in rows:
        by_axis.setdefault(row["axis"], []).append(row["value"])
    return "; ".join(f"*{AXES[axis].label}* {', '.join(values)}" for axis, values in by_axis.items())


def matter_sentence(run: OpenRun, measure: str) -> str:
    """Which settings matter by the rule, and which values are left after Holm's correction."""
    others = _others(run, measure)
    if not others:
        return "no comparison is defined, as no correlation is."
    mattering = [axis for axis in axes_of(run) if any(
        verdict in ("better", "worse") and row["axis"] == axis for row, verdict in others)]
    kept = "; ".join(f"{AXES[row['axis']].label} {row['value']} ({SCORE_NAMES[row['score']]}, "
                     f"{signed(row['less']['mean'])})" for row, _ in others if row["less"]["p_holm"] < 0.05)
    return (f"settings that matter by the rule: {', '.join(f'*{AXES[axis].label}*' for axis in mattering) or 'none'}; "
            f"left after Holm's correction, at the 5% level: {kept or 'none'}.")


def claims_sentence(run: OpenRun, measure: str) -> str:
    """The verdicts on the paper's claims in one measure."""
    table = claims_table(run)
    own = table[table["change in"] == NAMES[measure]]
    parts = []
    for claim, rows in own.groupby("the paper's claim", sort=False):
        said = ", ".join(f"{row['score']} **{row['verdict']}**{_beside(row)}" for row in rows.to_dict("records"))
        parts.append(f"*{claim}* ({rows['in'].iloc[0]}): {said}")
    return "; ".join(parts) + "."


def _beside(row: dict) -> str:
    """What a verdict on SAEs, one a value, has to be read with: r in turn, and how far two SAEs of one shape differ."""
    if ONE_A_VALUE not in row["verdict"]:
        return ""
    told = [f"{row['r, difference']}, p {row['p']}"] if row.get("r, difference") else []
    told += [f"r in turn {row['r of the values in turn']}"] if row.get("r of the values in turn") else []
    told += [f"two SAEs of one shape, trained apart, differ by {row[ALIKE]}"] if row.get(ALIKE) else []
    return f" ({'; '.join(told)})" if told else ""


def best_sentence(run: OpenRun, measure: str) -> str:
    """What the best of all values reaches, what the best reaches by chance, and how far it is above the run's own."""
    found = [row for row in run.get("sweep_correlations")["best"] if row["measure"] == measure]
    if not found:
        return "undefined, as no correlation is."
    told = "; ".join(
        f"the best of {best['scores']} values for {SCORE_NAMES[best['score']]} is *{AXES[best['axis']].label}: "
        f"{best['value']}*, r = {_two(best['pearson'])}{_above(run, best)}; with shuffled domains the best of as many "
        f"reaches {_two(best['chance_mean'])} on average and {_two(best['chance_high'])} or more in one order of "
        f"twenty (p {p_phrase(best['p'])}): **{best_verdict(best)}**" for best in found)
    return (f"{told}. A best that was picked is too high, and so is what it gains: on other domains expect less. Its "
            "interval does not know of the picking.")


def _above(run: OpenRun, best: dict) -> str:
    """What the best gains over the run's own score; for an SAE of the sweep, over the middle one too."""
    less = best["less_own"]
    if less is None:
        return ""
    rows = rows_of(run, best["measure"], score=best["score"], axis=best["axis"], value=best["value"])
    own = rows[0].get("less") if best["axis"] in SAE_AXES else None
    middle = f" and {signed(own['mean'])} ({_range(own['interval'])}) beside the sweep's middle SAE" if own else ""
    return f", {signed(less['mean'])} ({_range(less['interval'])}) beside the run's own{middle}"


def resolution_sentence(run: OpenRun, measure: str) -> str:
    """How small a difference this design can see: the width of the differences' intervals."""
    halves = [(row["less"]["interval"]["high"] - row["less"]["interval"]["low"]) / 2
              for row, verdict in _others(run, measure) if verdict != "the same"]
    alone = [(row["pearson_interval"]["high"] - row["pearson_interval"]["low"]) / 2 for row in rows_of(run, measure)
             if row.get("pearson_interval")]
    if not halves:
        return "undefined, as no correlation is."
    return (f"an interval of r alone reaches {np.median(alone):.2f} to either side (median over values and scores), "
            f"that of a difference {np.median(halves):.2f}. A setting that changes r by less than about that goes "
            "unseen here.")


# --- the SAEs -----------------------------------------------------------------------------------------------------

def own_sentence(run: OpenRun) -> str:
    """Which values count as the run's own, and that its SAE is not that of the sweep."""
    settings, tokens = run.settings, int(run.get("shift")["tokens"].item())
    said = (f"The run's own: N = {settings.top_n}, {counted(settings.shift_demonstrations, 'demonstration')} before a "
            f"training question and {settings.demonstrations} before a domain's, the paper's formulas.")
    if tokens < settings.shift_tokens:
        said += (f" The training questions hold {tokens:,} tokens that count, fewer than the {settings.shift_tokens:,} "
                 "asked for.")
    if run.get("sweep_saes").empty:
        return said
    return (f"{said} Every SAE of the sweep is trained alike, on {settings.sweep_text_tokens:,} tokens and "
            f"{settings.sweep_sae_samples:,} samples, and is compared with the one in the middle: layer "
            f"{settings.layer}, {settings.sae_latents:,} latents, k = {settings.sae_k}. The run's own SAE, which the "
            "other sweeps use, is none of these.")


def _training_sentence(run: OpenRun) -> str:
    """How much text the run's own SAE and the sweep's were trained on, and how well each of the two does."""
    own, settings = own_training(run), run.settings
    if None in (own.get("tokens"), own.get("samples"), own.get("explained")):
        return ("How the run's own SAE was trained is not recorded with it; that of the sweep had "
                f"{settings.sweep_text_tokens:,} tokens. ")
    middle = run.get("sweep_saes").query("own").iloc[0]
    return (f"The run's own was trained on {own['tokens']:,} tokens, {own['samples']:,} samples, and explains "
            f"{own['explained']:.0%} of the variance; the other on about {settings.sweep_text_tokens:,} tokens, "
            f"{settings.sweep_sae_samples:,} samples, and explains {middle['explained']:.0%} (each on its own held-out "
            "text). ")


def sae_difference(run: OpenRun, measure: str) -> str:
    """r with the run's own SAE and with the middle one of the sweep, beside what other values change; "" without."""
    parts = []
    for row in (row for row in run.get("sweep_correlations")["saes"] if row["measure"] == measure):
        changes = [abs(other["less"]["mean"]) for other, _ in _others(run, measure) if other["score"] == row["score"]]
        larger = sum(change > abs(row["mean"]) for change in changes)
        parts.append(f"{SCORE_NAMES[row['score']]}: r = {_two(row['own'])} with the run's own SAE, "
                     f"{_two(row['middle'])} with the sweep's middle one, a difference of {signed(row['mean'])} "
                     f"({_range(row['interval'])}; p {p_phrase(row['p'])}), **{value_verdict(row)}**; {larger} of "
                     f"{len(changes)} ablations change r by more")
    return "; ".join(parts) + "." if parts else ""


def sae_sentence(run: OpenRun, measure: str) -> str:
    """`sae_difference` with how the two SAEs were trained, and what cannot be told; "" if the run sweeps no SAEs."""
    if run.get("sweep_saes").empty:
        return ""
    found = sae_difference(run, measure)
    if not found:
        return "The run's own SAE and the sweep's cannot be compared, as no correlation is defined."
    settings = run.settings
    like = "alike in layer, width and k" if same_shape(run) else (
        f"which has {settings.sae_latents:,} latents and k = {settings.sae_k} at layer {settings.layer}")
    return (f"The run's own SAE beside the one in the middle of the sweep, {like}. {found} {_training_sentence(run)}"
            "How an SAE is trained, its text and its seed, is a source of variation of its own. With one SAE a value, "
            "no sweep here can tell it from what the width, the layer or k does.")


# --- the whole ----------------------------------------------------------------------------------------------------

def missing_sentence(run: OpenRun) -> str:
    """Sweeps that this run leaves out, each with the setting that asks for it; "" if it has all."""
    present = varied(run)
    absent = [f"{AXES[axis].label} (`{name}`)" for axis, name in FURTHER.items() if axis not in present]
    if not absent:
        return ""
    return ("**Not in this run.** These would have to read the domains again or train SAEs, and this run lists no "
            f"other values for them: {'; '.join(absent)}.")


def by_measure(run: OpenRun, sentence: Callable[[OpenRun, str], str]) -> str:
    """One of the sentences above for every measure, as a Markdown list."""
    return "\n".join(f"- Change in {NAMES[measure]}: {sentence(run, measure)}" for measure in measures(run))


def told_of(run: OpenRun, measure: str) -> str:
    """All that is said of one measure, as a Markdown list; that it was not evaluated if so."""
    if measure not in measures(run):
        return f"{_capital(NAMES[measure])} was not evaluated in this run; see the setting `eval_kinds`."
    told = (difference_sentence, claims_sentence, sae_difference, best_sentence)
    return "\n".join(f"- {_capital(said)}" for said in (one(run, measure) for one in told) if said)


def whole_answer(run: OpenRun) -> str:
    """The measure beside the first that the length of the answers does not enter: "" if it was not evaluated."""
    return "bits_answer" if "bits_answer" in measures(run)[1:] else ""


def summary(run: OpenRun) -> str:
    """First paragraph of the chapter: which settings matter in this run, then the rules that say so."""
    first, second, settings = measures(run)[0], whole_answer(run), run.settings
    rows = rows_of(run, first)
    told = [_capital(learned.learned_sentence(run)),
            f"Which settings matter? {_capital(difference_sentence(run, first))}",
            f"The paper's claims. {claims_sentence(run, first)}"]
    if second:
        told += [f"The same in {NAMES[second]}, which do not divide by the length of the answers: "
                 f"{matter_sentence(run, second)}",
                 f"The paper's claims in {NAMES[second]}. {claims_sentence(run, second)}"]
    sae = sae_sentence(run, first)
    told += [f"Does the training of the SAE matter? {sae}"] if sae else []
    told.append(f"Could the best be chance? {_capital(best_sentence(run, first))}")
    rules = folded_rules(FIXED_RULE, learned.RULE, CORRELATION_RULE, SETTING_RULE, CLAIM_RULE, BEST_RULE)
    listed = "\n".join(f"- {one}" for one in told)
    return (f"**The answer of this run**, for the change in {NAMES[first]} on `{settings.model}`, fine-tuned on "
            f"`{settings.sft_data}` and tested on `{settings.domain_data}`: n = {rows[0]['n']} domains, "
            f"{_seeds(run)}, {counted(len(varied(run)), 'setting')} varied, {_count(run, rows)}.\n\n{listed}\n\n"
            f"{rules}")


def _count(run: OpenRun, rows: list[dict]) -> str:
    """How many values there are in all; every own value of one kind is one and the same score."""
    others = sum(not row["own"] for row in rows) // len(SCORES)
    if any(row["axis"] in SAE_AXES for row in rows):
        return (f"{others + 2} different values in all, the run's own and, as SAEs are trained for the sweep, the "
                "middle one of these among them")
    return f"{counted(others + 1, 'different value')} in all, the run's own among them"


def _seeds(run: OpenRun) -> str:
    """How many seeds the ablations rest on, and that the run has more of them if so."""
    used, whole = 1 + len(repeated(run).other_seeds), 1 + len(run.other_seeds)
    return counted(used, "seed") + (f" (of the run's {whole})" if used < whole else "")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
