"""The book's main result in one small table: the score, its simplest rivals, and what is left of it given these."""

from __future__ import annotations

import pandas

from sts.book.pages_baselines import SCORE_NAMES, _range, _two, correlations_of, measures
from sts.book.pages_measures import NAMES
from sts.measure.baselines import PREDICTORS
from sts.run.run import OpenRun
from sts.stages.comparison import controls_of

#: What the star at the probe says.
NOTE = ("\\* held-out predictions; in brackets the central 95% for shuffled changes, which leaving a domain out pulls "
        "below zero. Random latents: mean and central 95% of the sets.")


#: Simple rivals that the table has.
RIVALS = ("base_bits", "base_bits_answer", "answer_shortness")
#: The measures that the table has, as far as they were evaluated.
COLUMNS = ("bits", "bits_answer", "p_right", "accuracy")


def headline_table(run: OpenRun) -> pandas.DataFrame:
    """r with its 95% interval in each of `COLUMNS` that was evaluated; mean over seeds.

    Rows: the scores; the same formulas with random latents of like energy (mean, and central 95% of the sets); bits
    before training; one over the length of the answers; a probe on raw activations (r, and central 95% for shuffled
    targets); the partial correlations of the scores given `controls_of` the measure. From stages
    `baseline_correlations`, `baseline_nulls` and `baseline_confounds`.
    """
    columns = {}
    for measure in (measure for measure in COLUMNS if measure in measures(run)):
        found = correlations_of(run, measure)
        nulls = {(row["predictor"], row["null"]): row for row in run.get("baseline_nulls")
                 if row["measure"] == measure}
        partial = {row["score"]: row for row in run.get("baseline_confounds")
                   if (row["measure"], row["controls"]) == (measure, list(controls_of(measure)))}
        columns[NAMES[measure]] = (
            {label: _said(found[score]) for score, label in SCORE_NAMES.items()}
            | {f"{label}, random latents of like energy": _drawn(nulls[score, "energy"], "mean")
               for score, label in SCORE_NAMES.items()}
            | {PREDICTORS[name].label: _said(found[name]) for name in RIVALS}
            | {f"{PREDICTORS['probe_raw'].label} *": _drawn(nulls.get(("probe_raw", "shuffled"), {}), "observed")}
            | {f"{label}, given hardness and lengths": _said(partial[score]) for score, label in SCORE_NAMES.items()})
    return pandas.DataFrame(columns).rename_axis("r with the absolute change in").reset_index()


def _drawn(row: dict, value: str) -> str:
    """A row of `baseline_nulls`: its value, and the central 95% of what was drawn."""
    return f"{_two(row[value])} ({_range(row)})" if row.get("low") is not None else "undefined"


def _said(row: dict) -> str:
    if row.get("pearson") is None:
        return "undefined"
    return f"{_two(row['pearson'])} ({_range(row['pearson_interval'])})"


def headline_markdown(run: OpenRun) -> str:
    """`headline_table` in Markdown, as the README has it of the run `full`."""
    frame = headline_table(run)
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
