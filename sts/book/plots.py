"""Figures of the chapters. Each function takes stage results and returns a matplotlib figure.

Legible at phone width: at most 7 inches wide, text of 9 points or more, colours of Okabe and Ito that colour-blind
readers can tell apart, and no meaning carried by colour alone.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy
import pandas
import seaborn
import torch
from adjustText import adjust_text
from matplotlib import patheffects
from matplotlib.figure import Figure

from sts.book.pages_measures import NOTHING_ELSE, SCORE_NAMES
from sts.engine.evaluate import MEASURES

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
VARIANT_LABELS = {"paper": "paper's formulas", "official_code": "official code"}


def _theme() -> None:
    seaborn.set_theme(style="whitegrid", rc={"font.size": 9, "axes.labelsize": 10, "axes.titlesize": 10,
                                             "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
                                             "figure.dpi": 110, "savefig.bbox": "tight"})


def _finished(figure: Figure) -> Figure:
    plt.close(figure)  # the notebook shows what a function returns; left open, the figure would be shown twice
    return figure


def training_curve(curve: list[dict]) -> Figure:
    """Loss and explained variance of an SAE against training samples seen."""
    _theme()
    frame = pandas.DataFrame(curve)
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    axes[0].plot(frame["samples"], frame["loss"], color=BLUE)
    axes[0].set(xlabel="training samples", ylabel="squared error (scaled units)", yscale="log")
    axes[1].plot(frame["samples"], frame["explained_variance"], color=GREEN)
    axes[1].set(xlabel="training samples", ylabel="variance explained in the batch", ylim=(None, 1))
    for axis in axes:
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    return _finished(figure)


def sft_curve(log: dict) -> Figure:
    """Training loss by step, with the held-out loss before and after as horizontal lines."""
    _theme()
    frame = pandas.DataFrame(log["curve"])
    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    axis.plot(frame["step"], frame["loss"], color=BLUE, marker=".", label="training batch")
    axis.axhline(log["held_out_before"], color=GREY, linestyle="--", label="held out, before")
    axis.axhline(log["held_out_after"], color=ORANGE, linestyle="-.", label="held out, after")
    axis.set(xlabel="optimiser step", ylabel="loss (nats per solution token)")
    axis.legend()
    return _finished(figure)


def shift_concentration(shares: torch.Tensor, top_n: int) -> Figure:
    """Cumulative share of squared change against the number of latents, most shifted first."""
    _theme()
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    count = numpy.arange(1, len(shares) + 1)
    axis.plot(count, shares.numpy(), color=BLUE, label="most shifted first")
    axis.plot(count, count / len(shares), color=GREY, linestyle="--", label="if all latents changed alike")
    axis.axvline(top_n, color=ORANGE, linestyle=":", label=f"N = {top_n}")
    axis.set(xlabel="number of latents", ylabel="share of total squared change", xscale="log", ylim=(0, 1))
    axis.legend(loc="upper left")
    return _finished(figure)


def domain_scores(scores: pandas.DataFrame) -> Figure:
    """Both scores of every domain, one panel a score, sorted by STS_ICL (paper's variant)."""
    _theme()
    own = scores[scores["variant"] == "paper"].sort_values("sts_icl")
    figure, axes = plt.subplots(1, 2, figsize=(7, 4), sharey=True, layout="constrained")
    for axis, score, unit in zip(axes, SCORE_NAMES, ("activation", "squared activation"), strict=True):
        axis.hlines(own["domain"], 0, own[score], color=GREY, linewidth=1)
        axis.plot(own[score], own["domain"], "o", color=BLUE)
        axis.set(xlabel=f"{SCORE_NAMES[score]} ({unit})", xlim=(0, None))
    return _finished(figure)


def not_evaluated() -> Figure:
    """What stands in a figure's place where its measure was not evaluated."""
    _theme()
    figure, axis = plt.subplots(figsize=(6.5, 0.9), layout="constrained")
    axis.text(0.5, 0.5, NOTHING_ELSE.replace("; ", ";\n"), ha="center", va="center")
    axis.set_axis_off()
    return _finished(figure)


def domain_shifts(shifts: pandas.DataFrame, measure: str) -> Figure:
    """Signed change by domain with its 95% interval; hollow where that includes zero or one item gives none.

    Args:
        measure: a key of `MEASURES`; "" draws `not_evaluated`.
    """
    if not measure:
        return not_evaluated()
    _theme()
    own = shifts[shifts["measure"] == measure].sort_values("shift")
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for row in own.itertuples():
        clear = row.low > 0 or row.high < 0
        axis.plot([row.low, row.high], [row.domain] * 2, color=GREY, linewidth=1.2)
        axis.plot(row.shift, row.domain, "o", color=BLUE, markerfacecolor=BLUE if clear else "white")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=f"change in {MEASURES[measure]}")
    return _finished(figure)


def _name_points(axis, x: pandas.Series, y: pandas.Series) -> None:
    """Write each point's name beside it, moved off other names and points (adjustText), with a line to the point."""
    names = y.sort_values().index
    texts = [axis.text(x[name], y[name], name, fontsize=8,
                       path_effects=[patheffects.withStroke(linewidth=2, foreground="white")]) for name in names]
    before = numpy.random.get_state()
    numpy.random.seed(0)  # adjustText draws from numpy's own generator; a page must come out alike each time
    try:
        adjust_text(texts, x=x[names].to_numpy(float), y=y[names].to_numpy(float), ax=axis, expand=(1.2, 1.9),
                    iter_lim=500, arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6})
    finally:
        numpy.random.set_state(before)


def score_scatter(scores: pandas.DataFrame, shifts: pandas.DataFrame, correlations: list[dict], measure: str,
                  variant: str = "paper") -> Figure:
    """Absolute shift against score, one panel a score, with least-squares line and interval of each shift.

    Hollow points: the interval of the domain's shift includes zero, or one item gives none.

    Args:
        measure: a key of `MEASURES`; "" draws `not_evaluated`.
    """
    return score_scatters([("", scores, shifts, correlations)], measure, variant) if measure else not_evaluated()


def score_scatters(runs: list[tuple[str, pandas.DataFrame, pandas.DataFrame, list[dict]]], measure: str,
                   variant: str = "paper") -> Figure:
    """`score_scatter` of several runs, one row of panels each; scales are each run's own.

    Args:
        runs: of each, what is written beside its row, and the results of stages scores, domain_shift and correlations.
        measure: a key of `MEASURES` that every run evaluated.
    """
    _theme()
    figure, axes = plt.subplots(len(runs), 2, figsize=(7, 0.3 + 3.5 * len(runs)), sharey="row", squeeze=False,
                                layout="constrained")
    for row, (name, scores, shifts, correlations) in zip(axes, runs, strict=True):
        own = scores[scores["variant"] == variant].set_index("domain")
        actual = shifts[shifts["measure"] == measure].set_index("domain")
        for axis, score in zip(row, SCORE_NAMES, strict=True):
            result = next(found for found in correlations if (found["measure"], found["variant"], found["score"])
                          == (measure, variant, score))
            _scatter(axis, own[score], actual, result)
            axis.set(xlabel=f"{SCORE_NAMES[score]} ({VARIANT_LABELS[variant]})")
        for axis, score in zip(row, SCORE_NAMES, strict=True):
            _name_points(axis, own.loc[actual.index, score], actual["shift"].abs())
        row[0].set(ylabel=f"{name}\nabsolute change in\n{MEASURES[measure]}".lstrip())
    return _finished(figure)


def _scatter(axis, score: pandas.Series, actual: pandas.DataFrame, result: dict) -> None:
    """One panel of `score_scatters`: absolute change of each domain with its interval, and the correlation."""
    for domain, row in actual.iterrows():
        x, y = score[domain], abs(row["shift"])
        clear = row["low"] > 0 or row["high"] < 0
        reach = sorted((abs(row["low"]), abs(row["high"])))
        axis.plot([x, x], [reach[0] if clear else 0, reach[1]], color=GREY, linewidth=0.8, alpha=0.6)
        axis.plot(x, y, "o", color=BLUE, markerfacecolor=BLUE if clear else "white")
    if "undefined" in result:
        axis.set_title("correlation undefined")
    else:
        ends = numpy.array([score.min(), score.max()])
        axis.plot(ends, result["line"]["intercept"] + result["line"]["slope"] * ends, color=ORANGE)
        p = "p < 0.001" if result["p"] < 0.001 else f"p = {result['p']:.3f}"
        axis.set_title(f"r = {result['pearson']:.2f}, {p}, n = {result['n']}")
    axis.margins(x=0.12)
