"""What the pages say about their numbers: provenance boxes and tables, as HTML with all text escaped."""

from __future__ import annotations

import html
import json

import pandas

from sts import learned
from sts.data import MATHEMATICS
from sts.pages_limits import clear_domains, limits_sentence, power_sentence
from sts.pages_measures import ACCURACIES, NAMES, measures_shown, p_value
from sts.paper import published_correlations
from sts.progress import duration
from sts.stages import OpenRun


def show_table(frame: pandas.DataFrame, *, digits: int = 3) -> str:
    """A frame as an HTML table that scrolls inside its own box; numbers with `digits` significant digits."""
    def number(value: float) -> str:
        return "" if pandas.isna(value) else f"{value:.{digits}g}"

    table = frame.to_html(index=False, border=0, escape=True, float_format=number, classes="dataframe")
    return f'<div class="sts-scroll">{table}</div>'


def banner(run: OpenRun) -> str:
    """One line for the top of a page: which run it shows."""
    settings = run.settings
    return (f'<div class="sts-run">Run <code>{html.escape(settings.name)}</code>: '
            f"{html.escape(settings.description)}. Model <code>{html.escape(settings.model)}</code>, layer "
            f"{settings.layer}, seed {settings.seed}.{_changed(run)}</div>")


def _changed(run: OpenRun) -> str:
    if not run.changed:
        return ""
    listed = ", ".join(f"{name} = {value}" for name, value in run.changed.items())
    return f" <strong>Changed from the profile: {html.escape(listed)}.</strong>"


def provenance(run: OpenRun, *stages: str) -> str:
    """A folded box: for each stage its key, data, weights, settings, software, device and time.

    Args:
        stages: names; by default all that the page asked for and what they rest on.
    """
    blocks = []
    for name in stages or run.used:
        record = run.provenance(name)
        if not record:
            continue
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        rows = {
            "key": record["key"], "settings": json.dumps(record["settings"]), "inputs": json.dumps(record["inputs"]),
            "seed": record["seed"], "computed": f"{record['finished']} in {duration(record['seconds'])}, process peak "
                                                f"{record['process_peak_memory_mb']} MB, {record['device']}",
            "work": _work(record.get("work", {})),
            "not recorded": record.get("withheld", ""),
            "software": f"Python {record['python']}, {versions}", "code": record["commit"] or "not under git",
        }
        lines = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
                        for key, value in rows.items() if value != "")
        blocks.append(f"<details><summary>{html.escape(name)}</summary><table>{lines}</table></details>")
    return (f'<div class="sts-provenance"><p>Provenance: run <code>{html.escape(run.settings.name)}</code>, '
            f"{len(blocks)} stages.</p>{''.join(blocks)}</div>")


# --- sentences made from numbers ----------------------------------------------------------------------------------

CORRELATION_RULE = ("A claim of positive correlation counts as *held* if the 95% bootstrap interval of Pearson's r "
                    "lies above zero and the permutation p is below 0.05; as *reversed* if the interval lies below "
                    "zero with p below 0.05; otherwise as *not shown*.")


def _work(work: dict) -> str:
    if not work.get("tokens"):
        return "no model run"
    return " ".join([f"{work['tokens']:,} tokens ({work['padded_tokens']:,} with padding); "
                     f"{work['passes']:,.0f} token-forward-passes.", *work["notes"]])


def correlation_verdict(result: dict) -> str:
    """held, reversed, not shown or undefined, by `CORRELATION_RULE`."""
    if "undefined" in result:
        return "undefined"
    interval = result["pearson_interval"]
    if result["p"] < 0.05 and interval["low"] > 0:
        return "held"
    if result["p"] < 0.05 and interval["high"] < 0:
        return "reversed"
    return "not shown"


def correlation_table(correlations: list[dict]) -> pandas.DataFrame:
    """One row per measure, variant and score: n, r with interval, p (also corrected by Holm's method for the number
    of rows), Spearman, R2, leave-one-out range, verdict."""
    from statsmodels.stats.multitest import multipletests

    defined = [index for index, result in enumerate(correlations) if "undefined" not in result]
    corrected = dict(zip(defined, multipletests([correlations[index]["p"] for index in defined], method="holm")[1],
                         strict=True)) if defined else {}
    rows = []
    for index, result in enumerate(correlations):
        row = {"shift measured in": result["measure"], "variant": result["variant"], "score": result["score"]}
        if "undefined" in result:
            rows.append(row | {"verdict": f"undefined: {result['undefined']}"})
            continue
        interval, one_out = result["pearson_interval"], result["leave_one_out"]
        rows.append(row | {
            "n": result["n"], "Pearson r": f"{result['pearson']:.2f}",
            "95% interval": f"{interval['low']:.2f} to {interval['high']:.2f}", "p": p_value(result["p"]),
            "p, Holm": p_value(corrected[index]),
            "Spearman": f"{result['spearman']:.2f}", "R²": f"{result['r_squared']:.2f}",
            "r without one domain": f"{one_out['low']:.2f} to {one_out['high']:.2f}" if one_out else "",
            "verdict": correlation_verdict(result)})
    return pandas.DataFrame(rows).fillna("")


def p_phrase(p: float) -> str:
    """What follows "p" in a sentence: "<0.001" or "= 0.012"."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def quality_table(qualities: dict[str, dict]) -> pandas.DataFrame:
    """SAE quality as a table: one row per measure, one column per SAE (label -> quality)."""
    columns = {}
    for label, one in qualities.items():
        splice = one["splice"]
        columns[label] = {
            "latents": f"{one['latents']:,}", "L0 (active latents a token)": f"{one['l0']:.1f}",
            "fraction of variance explained": f"{one['fraction_of_variance_explained']:.3f}",
            f"latents silent on these {one['tokens']:,} tokens": f"{one['dead'] / one['latents']:.1%}",
            "loss, model as it is (nats a token)": f"{splice['clean']:.3f}",
            "loss, reconstruction spliced in": f"{splice['spliced']:.3f}",
            "loss, activation set to its mean": f"{splice['mean_ablated']:.3f}",
            "share of that damage avoided": f"{splice['recovered']:.1%}",
        }
    frame = pandas.DataFrame(columns)
    return frame.rename_axis("measured on held-out text").reset_index()


def variant_table(scores: pandas.DataFrame) -> pandas.DataFrame:
    """Scores of both variants side by side with their ranks (1 is the highest), by domain."""
    wide = scores.pivot(index="domain", columns="variant", values=["sts_act", "sts_icl"])
    frame = pandas.DataFrame(index=wide.index)
    for score, label in (("sts_act", "STS_act"), ("sts_icl", "STS_ICL")):
        for variant in ("paper", "official_code"):
            values = wide[score, variant]
            frame[f"{label}, {variant}"] = values
            frame[f"rank ({label}, {variant})"] = values.rank(ascending=False).astype(int)
    return frame.sort_values("rank (STS_ICL, paper)").reset_index()


def variant_sentence(run: OpenRun) -> str:
    """How far the two variants agree, in words and numbers."""
    agreed, scores = run.get("variant_overlap"), run.get("scores")
    wide = scores.pivot(index="domain", columns="variant", values=["sts_act", "sts_icl"])
    chance = agreed["top_n"] ** 2 / agreed["latents"]
    ranks = {score: wide[score]["paper"].rank().corr(wide[score]["official_code"].rank())
             for score in ("sts_act", "sts_icl")}
    return (f"The two variants agree on {agreed['overlap']} of {agreed['top_n']} shifted latents (by chance: "
            f"{chance:.1f}). The rank correlation between them over {len(wide)} domains is {ranks['sts_act']:.2f} for "
            f"STS_act and {ranks['sts_icl']:.2f} for STS_ICL.")


def sft_sentence(run: OpenRun, log: dict) -> str:
    """What fine-tuning did to the held-out loss of its own domain; says so if it learned nothing."""
    method = f"LoRA adapters of rank {run.settings.lora_rank}" if run.settings.lora_rank else "all weights"
    before, after = log["held_out_before"], log["held_out_after"]
    fall = (before - after) / before
    sentence = (f"{log['train']} training examples, {log['steps']} steps, {method} "
                f"({log['trained_parameters']:,} trained parameters). The loss on {log['held_out']} held-out problems "
                f"goes from {before:.3f} to {after:.3f} nats a token ({-fall:+.0%}).")
    if left_out := log.get("left_out"):
        sentence += (f" {len(left_out)} more {'was' if len(left_out) == 1 else 'were'} left out, as the question alone "
                     f"is longer than the {run.settings.sft_max_length} tokens that the run trains on.")
    if run.settings.sft_data == "gsm_symbolic":
        sentence += (" They come from the same templates as the training problems, with other numbers and names, so a "
                     "part of this is learning the templates.")
    if fall < learned.SMALLEST_FALL:
        sentence += (" **That is less than a tenth: this run hardly learned, and nothing below should be read as a "
                     "test.**")
    return sentence


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
    lines = "\n".join([f"- {told[0].upper()}{told[1:]}", *(f"- {forecast_line(run, measure)}" for measure in shown)])
    if not {finest, accuracy} & set(ACCURACIES):
        lines += "\n- change in accuracy, the kind of measure that the paper uses: not evaluated (`eval_kinds`)."
    verdicts = [learned.judged(run, correlation_verdict(_find(run, measure, score)))
                for measure in shown for score in ("sts_act", "sts_icl")]
    if any(verdict != "held" for verdict in verdicts):
        lines += f"\n- {limits_sentence(run, finest)}"
    return (
        "**The answer of this run.** The paper claims that the score correlates with the absolute change of a domain. "
        f"On `{settings.model}`, fine-tuned on `{settings.sft_data}` and tested on `{settings.domain_data}`:\n\n"
        f"{lines}\n\n"
        f"{learned.RULE} {CORRELATION_RULE} {_multiplicity(run)} The intervals here resample domains alone. "
        "The chapter on baselines resamples the questions within them as well, which is wider, and may come to another "
        f"verdict; trust the wider one. Seed {settings.seed}, one training run. For "
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
    from sts.stats import pearson

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


def sae_sentence(run: OpenRun) -> str:
    """Where the run's SAE comes from, and on how much text it was trained, if that is known."""
    folder = run.sae_folder
    held_out = "The table is measured on the fifth of this page's texts that the small SAE was not trained on."
    record = folder / "training.json" if folder else None
    if record is None or not record.is_file():
        return f"The run's SAE is `{run.settings.sae}`; what it was trained on is not recorded with it. {held_out}"
    training = json.loads(record.read_text(encoding="utf-8"))
    own = "was trained within this run" if run.settings.sae == "train" else (
        f"lies in `{run.settings.sae}` and was trained before")
    sources = ", ".join(f"{name} {tokens:,}" for name, tokens in training["text"].items())
    return f"The run's SAE {own}, on {training['tokens']:,} tokens of text ({sources}). {held_out}"
