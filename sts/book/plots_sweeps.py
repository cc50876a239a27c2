"""Figures of the chapter on ablations, in the style of plots.py."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sts.book.plots import BLUE, GREY, ORANGE, SCORE_NAMES, _finished, _theme

#: score -> colour, marker, and to which side of its place it is drawn
STYLE = {"sts_act": (BLUE, "o", -1), "sts_icl": (ORANGE, "s", 1)}
#: Labels of more characters than this in all, with gaps, are turned.
LONG = 36


def sweeps(panels: dict[str, list[dict]], needed: float | None = None) -> Figure:
    """Correlation with interval against the value of a setting, one panel a setting.

    Args:
        panels: title -> rows with score, value (text, in order), own, r, low, high; r is None where no correlation is
            defined, low and high where there is no interval. The run's own value is filled.
        needed: r that is significant in one seed; drawn as dotted lines at both signs.
    """
    _theme()
    columns = min(2, len(panels))
    count = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(count, columns, figsize=(7, 0.7 + 2.3 * count), sharey=True, layout="constrained",
                                squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        values = list(dict.fromkeys(row["value"] for row in rows))
        for score, (colour, marker, side) in STYLE.items():
            own = [row for row in rows if row["score"] == score and row["r"] is not None]
            places = [values.index(row["value"]) + 0.12 * side for row in own]
            axis.plot(places, [row["r"] for row in own], color=colour, linewidth=0.8, alpha=0.5)
            for place, row in zip(places, own, strict=True):
                if row["low"] is not None:
                    axis.plot([place, place], [row["low"], row["high"]], color=colour, linewidth=1.4)
                axis.plot(place, row["r"], marker, color=colour, markersize=5,
                          markerfacecolor=colour if row["own"] else "white")
        if all(row["r"] is None for row in rows):
            axis.annotate("undefined", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
        axis.axhline(0, color="black", linewidth=0.8)
        for sign in (-1, 1) if needed else ():
            axis.axhline(sign * needed, color=GREY, linestyle=":", linewidth=1.2)
        turned = sum(len(value) + 2 for value in values) > LONG
        axis.set_xticks(range(len(values)), values, rotation=25 if turned else 0, ha="right" if turned else "center")
        axis.set(xlim=(-0.6, len(values) - 0.4), ylim=(-1.05, 1.05))
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", visible=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("Pearson's r")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    handles = _legend("the run's own value is filled")
    if needed:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label=f"p = 0.05 in one seed (r = {needed:.2f})"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return _finished(figure)


def _legend(note: str) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, marker=marker, label=f"{SCORE_NAMES[score]}, 95% interval")
               for score, (colour, marker, _) in STYLE.items()]
    return [*handles, Line2D([], [], color="none", marker="o", markeredgecolor=GREY, markerfacecolor=GREY, label=note)]


def differences(rows: list[dict]) -> Figure:
    """What other values change: r less that of the run's own value, with interval, one line a value, under its setting.

    Args:
        rows: group, value, score, mean, low, high, verdict; mean is None where no difference is defined. Filled: the
            interval leaves zero out (`verdict` is better or worse).
    """
    _theme()
    places, ticks, headings, height = {}, [], {}, -1.0
    for row in rows:
        if (row["group"], row["value"]) in places:
            continue
        if row["group"] not in headings:
            headings[row["group"]] = height + 1.15
            height += 1
        height += 1
        places[row["group"], row["value"]] = height
        ticks.append((height, row["value"]))
    figure, axis = plt.subplots(figsize=(7, 1.3 + 0.24 * (height + 1)), layout="constrained")
    for row in rows:
        colour, marker, side = STYLE[row["score"]]
        y = places[row["group"], row["value"]] + 0.16 * side
        if row["mean"] is None:
            continue
        if row["low"] is not None:
            axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.4)
        clear = row["verdict"] in ("better", "worse")
        axis.plot(row["mean"], y, marker, color=colour, markersize=5, markerfacecolor=colour if clear else "white")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(*zip(*ticks, strict=True))
    for label, y in headings.items():
        axis.annotate(label, (0, y), xycoords=("axes fraction", "data"), xytext=(-4, 0), textcoords="offset points",
                      ha="right", va="center", fontweight="bold", fontsize=9, annotation_clip=False)
    axis.set(ylim=(height + 0.7, -0.7), xlabel="r of this value less r of the run's own")
    axis.grid(axis="y", visible=False)
    figure.legend(handles=_legend("filled: the interval leaves zero out"), loc="outside lower center", ncols=2,
                  frameon=False)
    return _finished(figure)
