"""Figures of the chapter on training domains, in the style of plots.py."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy
import pandas
import seaborn
from matplotlib.figure import Figure

from sts.book.plots import BLUE, GREEN, GREY, ORANGE, SCORE_NAMES, _finished, _theme
from sts.engine.evaluate import MEASURES

#: Colour and marker of each training set in turn.
SET_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), ("#CC79A7", "D"), (GREY, "v"), ("#56B4E9", "P"))
#: Training sets side by side; a longer name is cut.
LONGEST = 16


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[:LONGEST - 1] + "…"


def _means(cells: pandas.DataFrame, column: str, *, absolute: bool = False) -> pandas.DataFrame:
    """Domains x training sets, in the order of the cells, mean over seeds."""
    values = cells.assign(value=cells[column].abs() if absolute else cells[column])
    wide = values.pivot_table(index="domain", columns="training_set", values="value", aggfunc="mean")
    return wide[list(dict.fromkeys(cells["training_set"]))]


def matrices(cells: pandas.DataFrame, score: str, measure: str) -> Figure:
    """Forecast (left) and absolute change (right): evaluation domains x training sets, as heat maps.

    Args:
        cells: stage `training_matrix`; the mean over seeds is drawn. A training set's own domain has a frame.
        score: of `SCORE_NAMES`.
        measure: of `MEASURES`.
    """
    _theme()
    own = cells[cells["measure"] == measure]
    trained = own.groupby("training_set")["trained_domain"].first()
    figure, axes = plt.subplots(1, 2, figsize=(7, 6), sharey=True, layout="constrained")
    panels = ((SCORE_NAMES[score], _means(own, score)),
              (f"absolute change in\n{MEASURES[measure]}", _means(own, "shift", absolute=True)))
    for axis, (title, values) in zip(axes, panels, strict=True):
        seaborn.heatmap(values, ax=axis, cmap="cividis", annot=True, fmt=".3g", annot_kws={"size": 9}, linewidths=0.5,
                        cbar_kws={"location": "bottom", "shrink": 0.8, "pad": 0.02})
        for column, name in enumerate(values.columns):
            if trained[name] in values.index:
                row = values.index.get_loc(trained[name])
                axis.add_patch(plt.Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, edgecolor=ORANGE,
                                             linewidth=2.5))
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="training set", ylabel="")
        axis.set_xticks(numpy.arange(len(values.columns)) + 0.5, [_short(name) for name in values.columns],
                        rotation=30, ha="right", rotation_mode="anchor")
    axes[0].set(ylabel="evaluation domain")
    return _finished(figure)


def clouds(cells: pandas.DataFrame, measure: str) -> Figure:
    """Absolute change against each score: one point a training set and evaluation domain, mean over seeds."""
    _theme()
    own = cells[cells["measure"] == measure]
    change = _means(own, "shift", absolute=True)
    figure, axes = plt.subplots(1, len(SCORE_NAMES), figsize=(7, 3.8), sharey=True, layout="constrained")
    for axis, (score, label) in zip(axes, SCORE_NAMES.items(), strict=True):
        forecast = _means(own, score)
        for place, name in enumerate(change.columns):
            colour, marker = SET_STYLES[place % len(SET_STYLES)]
            axis.plot(forecast[name], change[name], marker, color=colour, markersize=6, alpha=0.8, label=_short(name))
        axis.set(xlabel=label)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set(ylabel=f"absolute change in\n{MEASURES[measure]}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return _finished(figure)


def shared_lists(rows: list[dict], n: int) -> Figure:
    """Latents that a list estimated for one training set shares with the list moved by training on another.

    Args:
        rows: of stage `training_overlap`; the mean over seeds is drawn, as a share of `n`. Left: the list that
            demonstrations move; right: the latents that fire most, for comparison.
    """
    _theme()
    frame = pandas.DataFrame(rows)
    order = list(dict.fromkeys(frame["trained"]))
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), sharey=True, layout="constrained")
    for axis, (kind, title) in zip(axes, (("foreseen", "list moved by demonstrations"),
                                          ("by_rate", "list that fires most")), strict=True):
        shares = frame.pivot_table(index="estimated", columns="trained", values=kind).loc[order, order] / n
        labels = [_short(name) for name in order]
        seaborn.heatmap(shares, ax=axis, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".0%", cbar=False,
                        annot_kws={"size": 9}, linewidths=0.5, xticklabels=labels, yticklabels=labels)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="trained on", ylabel="")
        axis.set_xticklabels(labels, rotation=30, ha="right", rotation_mode="anchor")
    axes[0].set(ylabel="list of the questions of")
    axes[0].set_yticklabels([_short(name) for name in order], rotation=0)
    return _finished(figure)
