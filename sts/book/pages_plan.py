"""The chapter on costs, its part on paper: tables and sentences made from `cost.plan` and `cost.sensitivity`."""

from __future__ import annotations

from dataclasses import fields

import pandas
from transformers import AutoConfig

from sts.engine.models import resolve_model
from sts.measure import cost
from sts.run.run import OpenRun

#: What is planned -> label.
PLAN_LABELS = {"forecast": "forecast", "forecast_uncached": "forecast, demonstrations not shared",
               "training": "fine-tuning", "evaluation": "evaluation, before and after"}
#: What every number of the plan means.
MEANINGS = {
    "shift_tokens": "question tokens for the shifted dimensions, read twice",
    "shift_demonstrations": "demonstrations before a training question",
    "domains": "domains of MMLU-Pro", "score_tokens": "question tokens of a domain, read twice",
    "demonstrations": "demonstrations before a domain's question, in forecast and evaluation",
    "sft_examples": "training examples", "sft_epochs": "epochs", "sft_max_length": "longest training example, tokens",
    "passes_per_trained_token": "token-forward-passes of a trained token (full fine-tuning)",
    "evaluated_questions": "questions evaluated before, and again after",
    "sft_question_tokens": "tokens of a training question, with its template",
    "sft_solution_tokens": "tokens of a training solution",
    "question_tokens": "tokens of a domain's question, with options and template",
    "demonstration_tokens": "tokens of a domain's demonstration",
    "generated_tokens": "tokens of the answer written to an evaluated question",
    "demonstration_sets": "sets of demonstrations that the forecast draws",
    "evaluation_prefix_cached": "the evaluation runs a domain's demonstrations once",
}


def range_text(varied: pandas.DataFrame, low: str, high: str, between: str) -> str:
    """The smallest of one column and the largest of another, as text."""
    return f"{_rounded(varied[low].min())} {between} {_rounded(varied[high].max())}"


def _rounded(value: float) -> str:
    """Two significant digits: an estimate has no more."""
    return f"{float(f'{value:.2g}'):,g}"


def si(value: float) -> str:
    """A count with three digits and a unit prefix: 14.5 G, 132 k."""
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 0.9995 * 10**exponent:
            return f"{float(f'{value / 10**exponent:.3g}'):g} {prefix}"
    return f"{value:.3g}"


def run_architecture(run: OpenRun) -> cost.Architecture:
    """The shape of the run's model and SAE; raises `StsError` for a family that the formulas do not describe."""
    location, identity = resolve_model(run.settings.model, run.settings.model_revision, run.results / "models")
    pinned = {"revision": run.settings.model_revision or None} if identity.startswith("hub:") else {}
    return cost.architecture_of(AutoConfig.from_pretrained(location, **pinned), name=f"this run: {run.settings.model}",
                                sae_layer=run.settings.layer, sae_latents=len(run.get("shift")["difference_L"]))


def architecture_table(architectures: list[cost.Architecture], keys: int = 1000) -> pandas.DataFrame:
    """FLOPs of one token that attends to `keys` others."""
    def share(one: cost.Architecture) -> float:
        return (one.flops(keys, one.layers_read) + one.sae_flops) / (one.flops(keys) + one.head_flops)

    return pandas.DataFrame([{
        "model": one.name, "layers run, of": f"{one.layers_read} of {one.layers}",
        "all layers": si(one.flops(keys)), "LM head": si(one.head_flops),
        "to the SAE's layer": si(one.flops(keys, one.layers_read)), "latents": f"{one.sae_latents:,}",
        "SAE's encoder": si(one.sae_flops),
        "encoder, in layers": f"{one.sae_flops / one.flops(keys, 1):.1f}",
        "read and encode / whole pass": f"{share(one):.0%}",
    } for one in architectures])


def given_table(settings: cost.Settings, assumed: cost.Assumptions) -> pandas.DataFrame:
    """Every number that the plan rests on: parameter, meaning, value, and whether the paper gives it."""
    return pandas.DataFrame([
        {"parameter": field.name, "meaning": MEANINGS[field.name], "value": _shown(getattr(source, field.name)),
         "from": origin}
        for source, origin in ((settings, "the paper"), (assumed, "our assumption")) for field in fields(source)])


def _shown(value: int | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:,}"


def plan_table(planned: pandas.DataFrame) -> pandas.DataFrame:
    """`cost.plan` as text, with what finding out costs divided by each way to forecast."""
    rows = []
    for model, own in planned.groupby("model", sort=False):
        by_what = own.set_index("what")
        found = by_what.loc[["training", "evaluation"]].sum(numeric_only=True)
        for what, one in by_what.iterrows():
            forecast = what.startswith("forecast")
            rows.append({"model": model, "": PLAN_LABELS[what], "tokens": si(one["tokens"]),
                         "passes": si(one["passes"]), "FLOPs": si(one["flops"]),
                         **{f"finding out / this, {label}": _rounded(found[unit] / one[unit]) if forecast else ""
                            for unit, label in (("passes", "passes"), ("flops", "FLOPs"))}})
    return pandas.DataFrame(rows)


def sensitivity_sentence(once: pandas.DataFrame, again: pandas.DataFrame, factor: float) -> str:
    """How far the ratio moves with the assumptions, with demonstrations run once and again for every question."""
    single = once[once["assumption"] != "all"]
    widest = single.loc[(single["high"] / single["low"]).idxmax()]
    said = []
    for frame, label in ((once, "demonstrations run once"), (again, "demonstrations run again for every question")):
        whole = frame[frame["assumption"] == "all"]
        said.append(f"{label}, the ratio is {range_text(whole, 'ratio', 'ratio', 'to')} as assumed, and between "
                    f"{range_text(whole, 'low', 'high', 'and')} when every assumption may be off by a factor of "
                    f"{factor:g} at once")
    return (f"With {said[0]}. With {said[1]}. The single assumption that matters most is `{widest['assumption']}` "
            f"({widest['model']}: {_rounded(widest['low'])} to {_rounded(widest['high'])}).")
