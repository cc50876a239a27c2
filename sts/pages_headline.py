"""The book's main result in one small table: the score, its simplest rivals, and what is left of it given these."""

from __future__ import annotations

import pandas

from sts.baselines import PREDICTORS
from sts.pages_baselines import SCORE_NAMES, _range, _two, correlations_of, measures
from sts.pages_measures import NAMES, ORDER
from sts.pipeline_comparison import controls_of, hardness_of
from sts.stages import OpenRun


def headline_table(run: OpenRun) -> pandas.DataFrame:
    """r with its 95% interval in each of `pages_measures.ORDER` that was evaluated; mean over seeds.

    Rows: the scores; bits before training, in the unit of the measure; one over the length of the answers; and the
    partial correlations of the scores given hardness, length of the questions and length of the answers. From stages
    `baseline_correlations` and `baseline_confounds`.
    """
    columns = {}
    for measure in (measure for measure in measures(run) if measure in ORDER):
        found = correlations_of(run, measure)
        partial = {row["score"]: row for row in run.get("baseline_confounds")
                   if (row["measure"], row["controls"]) == (measure, list(controls_of(measure)))}
        columns[NAMES[measure]] = (
            {label: _said(found[score]) for score, label in SCORE_NAMES.items()}
            | {"bits before training": _said(found[hardness_of(measure)]),
               PREDICTORS["answer_shortness"].label: _said(found["answer_shortness"])}
            | {f"{label}, given hardness and lengths": _said(partial[score]) for score, label in SCORE_NAMES.items()})
    return pandas.DataFrame(columns).rename_axis("r with the absolute change in").reset_index()


def _said(row: dict) -> str:
    if row.get("pearson") is None:
        return "undefined"
    return f"{_two(row['pearson'])} ({_range(row['pearson_interval'])})"


def headline_markdown(run: OpenRun) -> str:
    """`headline_table` in Markdown, as the README has it of the run `full`."""
    frame = headline_table(run)
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
