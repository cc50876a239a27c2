"""Figures and tables of the chapter on the paper's own numbers.

Each function takes a frame from `sts.measure.paper` and returns a matplotlib Figure, 6.2 inches wide with type of at least
10 points, so that it stays legible on a phone. Colours are from the Okabe-Ito palette, which readers with colour vision
deficiency can tell apart; every colour also has a marker or a hatch of its own.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sts.measure import paper

WIDTH_INCHES = 6.2
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#767676", "#009E73"
#: colour and marker of the two ends of the ranking by absolute shift, and of what lies between.
ENDS = {"largest": (ORANGE, "o"), "smallest": (BLUE, "s"), "between": (GREY, "D")}
SHIFT_LABEL = "Change of accuracy (percentage points)"
ABS_SHIFT_LABEL = "|Change of accuracy|\n(percentage points)"
_STYLE = {"font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10,
          "legend.fontsize": 10, "figure.dpi": 110}


def _panels(rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    with sns.axes_style("whitegrid"), plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(WIDTH_INCHES, height), layout="constrained",
                                    squeeze=False, **options)
    plt.close(figure)  # a notebook shows the returned figure; left open it would appear twice
    return figure, axes


def _finish(figure: Figure, handles: list, columns: int) -> Figure:
    with plt.rc_context(_STYLE):
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    for axes in figure.axes:
        sns.despine(ax=axes, left=True)
    return figure


def _ends(model: str, shifts: pd.DataFrame, count: int) -> dict[str, str]:
    chosen = paper.extremes(paper.shifts_of(model, shifts), count)
    return dict(zip(chosen["domain"], chosen["end"], strict=True))


def shifts_figure(shifts: pd.DataFrame, count: int = 4) -> Figure:
    """Tables 2 to 4 as bars: signed shift of every domain, one panel a model, the extremes of |shift| picked out.

    Args:
        shifts: as `paper.accuracy_shifts()`.
        count: how many domains are marked at either end.
    """
    models = [model for model in paper.MODELS if model in set(shifts["model"])]
    # One order for all panels, largest mean |shift| on top, so that a domain can be followed across.
    domains = list(shifts.groupby("domain")["abs_shift_pct"].mean().sort_values().index)
    figure, axes = _panels(1, len(models), 4.9, sharey=True, sharex=True)
    for axis, model in zip(axes[0], models, strict=True):
        ends = _ends(model, shifts, count)
        values = shifts[shifts["model"] == model].set_index("domain")["shift_pct"].reindex(domains)
        kinds = [ends.get(domain, "between") for domain in domains]
        bars = axis.barh(domains, values, color=[ENDS[kind][0] for kind in kinds], height=0.7, zorder=2)
        for bar, kind, value in zip(bars, kinds, values, strict=True):
            bar.set_hatch({"smallest": "///", "between": "", "largest": ""}[kind])
            bar.set_edgecolor("white")
            # A dot at the bar's end keeps the shifts near zero visible.
            axis.plot(value, bar.get_y() + bar.get_height() / 2, marker=ENDS[kind][1], markersize=4,
                      color=ENDS[kind][0], zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(paper.MODELS[model].replace("-Instruct", "-\nInstruct"))
        axis.grid(axis="y", visible=False)
    # One label under the middle panel stands for all: a figure-wide one would lie under the legend.
    axes[0, len(models) // 2].set_xlabel(SHIFT_LABEL)
    axes[0, 0].set_ylabel("MMLU-Pro domain")
    labels = {"largest": f"{count} largest |change|", "smallest": f"{count} smallest |change|", "between": "between"}
    handles = [Patch(facecolor=ENDS[kind][0], edgecolor="white", hatch="///" if kind == "smallest" else "", label=text)
               for kind, text in labels.items()]
    return _finish(figure, handles, 3)


def scatter_figure(points: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Figure 3 redrawn: |shift| against STS, a row a model and a column a score, with fitted lines.

    The dashed line is fitted without the point named in the panel: the one whose absence changes Pearson's
    correlation most.

    Args:
        points: as `paper.figure3_points()`.
        results: as `paper.recomputed_correlations(points)`.
    """
    models = [model for model in paper.MODELS if model in set(points["model"])]
    figure, axes = _panels(len(models), len(paper.METRICS), 2.75 * len(models) + 0.5, sharey="row")
    for row in results.itertuples():
        axis = axes[models.index(row.model), list(paper.METRICS).index(row.metric)]
        panel = points[(points["model"] == row.model) & (points["metric"] == row.metric)].set_index("domain")
        ends = dict.fromkeys(panel["abs_shift_pct"].nlargest(len(panel) // 2).index, "largest")
        for domain, point in panel.iterrows():
            colour, marker = ENDS[ends.get(domain, "smallest")]
            axis.plot(point["sts"], point["abs_shift_pct"], marker, color=colour, markersize=6, zorder=3)
        _line(axis, panel["sts"], row.slope, row.intercept, "-")
        influential = row.low_without if row.pearson - row.leave_one_out_low > row.leave_one_out_high - row.pearson \
            else row.high_without
        rest = panel.drop(influential)
        _line(axis, panel["sts"], *np.polyfit(rest["sts"], rest["abs_shift_pct"], 1), "--")
        _name(axis, influential, panel.loc[influential, "sts"], panel.loc[influential, "abs_shift_pct"], panel["sts"])
        exact = "exact " if row.exact else ""
        axis.set_title(f"{paper.MODELS[row.model]}\nr = {row.pearson:.2f}, {exact}p = {row.p:.3g}")
        axis.set_xlabel(f"{paper.METRICS[row.metric]} (the paper's scale)")
        axis.set_ylim(min(-0.8, -0.06 * panel["abs_shift_pct"].max()), 1.18 * panel["abs_shift_pct"].max())
    for axis in axes[:, 0]:
        axis.set_ylabel(ABS_SHIFT_LABEL)
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=f"{end} |change|")
               for end, (colour, marker) in list(ENDS.items())[:2]]
    handles += [Line2D([], [], color="black", linestyle="-", label="fit, all points"),
                Line2D([], [], color="black", linestyle="--", label="fit without named point")]
    return _finish(figure, handles, 2)


def _line(axis, x: pd.Series, slope: float, intercept: float, style: str) -> None:
    ends = np.array([x.min(), x.max()])
    axis.plot(ends, slope * ends + intercept, style, color="black", linewidth=1.3, zorder=1)


def _name(axis, name: str, x: float, y: float, all_x: pd.Series) -> None:
    right = x > (all_x.min() + all_x.max()) / 2
    axis.annotate(name, (x, y), xytext=(-7 if right else 7, 5), textcoords="offset points", fontsize=10,
                  ha="right" if right else "left")


def intervals_figure(results: pd.DataFrame) -> Figure:
    """Each correlation three ways: as published with its spread over repetitions, with its bootstrap interval over
    domains, and its range when one domain is left out.

    Args:
        results: as `paper.recomputed_correlations()`.
    """
    figure, axes = _panels(1, 1, 4.6)
    axis, labels = axes[0, 0], []
    order = results["model"].map(list(paper.MODELS).index) * 10 + results["metric"].map(list(paper.METRICS).index)
    # The y axis counts upwards, so the last row is drawn first.
    for position, row in enumerate(results.iloc[order.argsort()[::-1]].itertuples()):
        labels.append(f"{paper.MODELS[row.model].split('-')[0]}, {paper.METRICS[row.metric]}")
        axis.errorbar(row.published_pearson, position + 0.24, xerr=row.published_std, color=GREEN, marker="D",
                      markersize=5, capsize=3, linewidth=1.5)
        axis.errorbar(row.pearson, position, xerr=[[row.pearson - row.low], [row.high - row.pearson]], color=BLUE,
                      marker="o", markersize=5, capsize=3, linewidth=1.5)
        axis.plot([row.leave_one_out_low, row.leave_one_out_high], [position - 0.24] * 2, color=ORANGE, marker="|",
                  markersize=9, linewidth=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlim(-1, 1.02)
    axis.set_xlabel("Pearson correlation with |change of accuracy| (no unit)")
    axis.set_ylabel("Model and score")
    handles = [Line2D([], [], color=GREEN, marker="D", label="published, ± std of repetitions"),
               Line2D([], [], color=BLUE, marker="o", label="95% bootstrap over domains"),
               Line2D([], [], color=ORANGE, marker="|", linewidth=3, label="one domain left out")]
    return _finish(figure, handles, 2)


def selection_figure(simulated: pd.DataFrame, domains: int = 14, count: int = 4) -> Figure:
    """*Simulated*: what picking extremes does to the average correlation, and to the chance of a significant one.

    Args:
        simulated: as `paper.selection_effect(...)`, true correlations ascending.
        domains, count: the numbers it was made with, for the labels.
    """
    figure, axes = _panels(1, 2, 3.9)
    lines = {"extremes": (f"{count} largest + {count} smallest", ORANGE, "o"),
             "all": (f"all {domains} domains", BLUE, "s"), "random": (f"{2 * count} random domains", GREY, "D")}
    for kind, (_, colour, marker) in lines.items():
        axes[0, 0].plot(simulated["true"], simulated[f"{kind}_mean"], color=colour, marker=marker, markersize=5)
        axes[0, 1].plot(simulated["true"], simulated[f"{kind}_found"], color=colour, marker=marker, markersize=5)
    axes[0, 0].fill_between(simulated["true"], simulated["extremes_low"], simulated["extremes_high"], color=ORANGE,
                            alpha=0.15, linewidth=0)
    axes[0, 0].plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("Pearson correlation seen\n(mean; band: 95%)")
    axes[0, 1].axhline(0.05, color="black", linewidth=0.8, linestyle=":")
    axes[0, 1].set_ylabel("Share with p < 0.05")
    axes[0, 1].set_ylim(0, 1.02)
    for axis, title in zip(axes[0], ("How large it looks", "How often it is found"), strict=True):
        axis.set_title(f"{title}\n(simulated)")
        axis.set_xlabel("True correlation (no unit)")
    handles = [Line2D([], [], color=colour, marker=marker, label=label) for label, colour, marker in lines.values()]
    return _finish(figure, handles, 3)


def html_table(frame: pd.DataFrame, *, digits: int = 2, rename: dict[str, str] | None = None) -> HTML:
    """A frame as an HTML table that scrolls inside its own box; cells are escaped, missing values are blank.

    Args:
        frame: what to show; its index is left out.
        digits: decimals of columns of numbers with a fraction.
        rename: column headings; others have their underscores replaced by spaces.
    """
    headings = {column: (rename or {}).get(column, str(column).replace("_", " ")) for column in frame.columns}
    # A pivoted frame's columns have a name, which would get a heading of its own.
    shown = frame.rename(columns=headings).rename_axis(columns=None)
    for key, names in (("model", paper.MODELS), ("metric", paper.METRICS)):
        if key in frame.columns:
            shown[headings[key]] = frame[key].map(names).fillna(frame[key])
    table = shown.to_html(index=False, escape=True, border=0, na_rep="",
                          # Adding zero turns -0.00 into 0.00.
                          float_format=lambda value: f"{round(value, digits) + 0.0:.{digits}f}")
    # tabindex lets a keyboard reach the box to scroll it.
    return HTML(f'<div class="sts-scroll" style="overflow-x: auto" tabindex="0">{table}</div>')
