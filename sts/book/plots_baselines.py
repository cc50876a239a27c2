"""Figures of the chapter on baselines, in the style of plots.py."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sts.book.plots import BLUE, GREEN, GREY, ORANGE, _finished, _theme

#: kind of row -> (what the legend says, colour, marker, filled)
ROW_STYLE = {"forecast": ("known before training, 95% interval", BLUE, "o", True),
             "after": ("needs the tuned model, 95% interval", ORANGE, "s", False),
             "random": ("random latents, mean and 95% of the sets", GREY, "D", False),
             "probe": ("probe; bar: 95% of shuffled targets", GREEN, "^", True)}


def forest(panels: dict[str, list[dict]], needed: float | None = None) -> Figure:
    """Correlation with interval of every predictor, one panel a measure, one line a predictor, under its group.

    Args:
        panels: title -> rows with label, group, kind (of `ROW_STYLE`), r, low, high; the same labels in every panel.
            r is None where no correlation is defined; low and high are None where there is no interval.
        needed: r that is significant; drawn as dotted lines at both signs.
    """
    _theme()
    first = next(iter(panels.values()))
    places, ticks, height = {}, [], 0.0
    for place, row in enumerate(first):
        if place and row["group"] != first[place - 1]["group"]:
            height += 0.5  # a gap between groups
        places[row["group"], row["label"]] = height
        ticks.append((height, row["label"]))
        height += 1
    figure, axes = plt.subplots(1, len(panels), figsize=(7 if len(panels) < 3 else 8, 1.4 + 0.24 * height), sharey=True,
                                layout="constrained", squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for row in rows:
            y = places[row["group"], row["label"]]
            _, colour, marker, filled = ROW_STYLE[row["kind"]]
            if row["r"] is None:
                axis.annotate("undefined", (0, y), ha="center", va="center", fontsize=9, color=GREY)
                continue
            if row["low"] is not None:
                wide = row["kind"] == "probe"  # chance, not an interval of the estimate
                axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=6 if wide else 1.4,
                          alpha=0.3 if wide else 1, solid_capstyle="butt")
            axis.plot(row["r"], y, marker, color=colour, markersize=5, markerfacecolor=colour if filled else "white")
        axis.axvline(0, color="black", linewidth=0.8)
        for sign in (-1, 1) if needed else ():
            axis.axvline(sign * needed, color=GREY, linestyle=":", linewidth=1.2)
        axis.set(xlim=(-1.05, 1.05), xlabel="Pearson's r", ylim=(height - 0.3, -0.7))
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(*zip(*ticks, strict=True))
    kinds = [kind for kind in ROW_STYLE if any(row["kind"] == kind for row in first)]
    handles = [Line2D([], [], color=colour, marker=marker, markerfacecolor=colour if filled else "white", label=label)
               for label, colour, marker, filled in (ROW_STYLE[kind] for kind in kinds)]
    if needed:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label=f"p = 0.05 in one seed (r = {needed:.2f})"))
    figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False)
    return _finished(figure)
