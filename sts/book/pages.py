"""What the pages say about their numbers: provenance boxes and tables, as HTML with all text escaped."""

from __future__ import annotations

import html
import json

import pandas

from sts.book import learned
from sts.book.pages_measures import NAMES, p_value
from sts.book.plots import SCORE_NAMES
from sts.run.progress import duration
from sts.run.recorded import texts_withheld
from sts.run.run import OpenRun


def show_table(frame: pandas.DataFrame, *, digits: int = 3) -> str:
    """A frame as an HTML table that scrolls inside its own box; numbers with `digits` significant digits."""
    def number(value: float) -> str:
        return "" if pandas.isna(value) else f"{value:.{digits}g}"

    table = frame.to_html(index=False, border=0, escape=True, float_format=number, classes="dataframe")
    return f'<div class="sts-scroll">{table}</div>'


def folded_rules(*rules: str) -> str:
    """Markdown: the rules behind a page's verdicts as a list that opens on a click."""
    return "\n".join(["<details><summary>The rules of these verdicts</summary>", "", *(f"- {rule}" for rule in rules),
                      "", "</details>"])


def texts_note(run: OpenRun, stage: str, chapter: str) -> str:
    """HTML: that the texts of a recorded result are not recorded, and how to read them; "" where they are there."""
    if not texts_withheld(run.get(stage)):
        return ""
    name = html.escape(run.settings.name)
    return ("<p><strong>The texts are not here.</strong> This run is shown from recorded results, which hold no texts "
            "of data sets. To read them, with the model and the data (<code>sts doctor</code>): "
            f"<code>sts stage {stage} --run {name} --again</code>, then <code>sts run {chapter} --run {name}</code>. "
            "Runs that are computed where they are read, such as <code>laptop</code>, show theirs.</p>")


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
        row = {"change in": NAMES[result["measure"]], "variant": result["variant"].replace("_", " "),
               "score": SCORE_NAMES[result["score"]]}
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
