"""Figures of the chapter on costs; the same conventions as in plots.py."""

from __future__ import annotations

import statistics

import matplotlib.pyplot as plt
import numpy
import pandas
from matplotlib.figure import Figure

from sts.book.pages_plan import PLAN_LABELS
from sts.book.pages_speed import WORKLOADS, Benchmark, Row
from sts.book.plots import BLUE, GREEN, GREY, ORANGE, _finished, _theme

MODEL_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (GREY, "^"))


def _wrapped(text: str, width: int = 26) -> str:
    """Break a label into lines of at most `width` characters."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def measured_costs(costs: pandas.DataFrame) -> Figure:
    """Seconds and token-forward-passes of each group of stages, as bars; hatched: not counted in the totals."""
    _theme()
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.9), sharey=True, layout="constrained")
    positions = numpy.arange(len(costs))[::-1]
    for axis, unit, label in zip(axes, ("seconds", "passes"), ("seconds", "token-forward-passes"), strict=True):
        for position, (_, row) in zip(positions, costs.iterrows(), strict=True):
            if numpy.isnan(row[unit]):
                axis.text(0, position, " not recorded", va="center")
                continue
            axis.barh(position, row[unit], color=BLUE if row["counted"] else "white", height=0.6, zorder=2,
                      edgecolor=BLUE if row["counted"] else GREY, hatch="" if row["counted"] else "///")
            axis.text(row[unit], position, f" {row[unit]:,.{0 if row[unit] >= 10 else 1}f}", va="center")
        axis.set(xlabel=label)
        axis.margins(x=0.28)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda value, position: f"{value:,g}")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(positions, [_wrapped(group, 22) for group in costs["group"]])
    return _finished(figure)


def _by_model(axis, models: list[str], count: int):
    """For each model: its name, colour, marker and the heights of its points on `count` rows."""
    offsets = numpy.linspace(0.22, -0.22, len(models)) if len(models) > 1 else [0.0]
    for model, offset, (colour, marker) in zip(models, offsets, MODEL_STYLES, strict=False):
        yield model, colour, marker, numpy.arange(count)[::-1] + offset


def planned_costs(planned: pandas.DataFrame) -> Figure:
    """`cost.plan` on logarithmic axes: passes and FLOPs of forecast, fine-tuning and evaluation, for each model."""
    _theme()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharey=True, layout="constrained")
    models, kinds = list(dict.fromkeys(planned["model"])), list(PLAN_LABELS)
    for axis, unit, label in zip(axes, ("passes", "flops"), ("token-forward-passes", "FLOPs"), strict=True):
        for model, colour, marker, heights in _by_model(axis, models, len(kinds)):
            own = planned[planned["model"] == model].set_index("what").loc[kinds, unit]
            axis.plot(own, heights, marker, color=colour, label=model if unit == "passes" else None)
        axis.set(xlabel=f"{label} (logarithmic)", xscale="log")
        axis.margins(x=0.1)
    axes[0].set_yticks(numpy.arange(len(kinds))[::-1], [_wrapped(PLAN_LABELS[kind]) for kind in kinds])
    figure.legend(loc="outside lower center", ncols=len(models), frameon=False)
    return _finished(figure)


def sensitivity(varied: pandas.DataFrame) -> Figure:
    """`cost.sensitivity`: for each assumption the range of the ratio, most important first, and all at once."""
    _theme()
    models = list(dict.fromkeys(varied["model"]))
    width = (varied["high"] / varied["low"]).groupby(varied["assumption"]).max().drop("all")
    order = [*width.sort_values(ascending=False).index, "all"]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for model, colour, marker, heights in _by_model(axis, models, len(order)):
        own = varied[varied["model"] == model].set_index("assumption").loc[order]
        axis.hlines(heights, own["low"], own["high"], color=colour, linewidth=2)
        axis.plot(own["ratio"], heights, marker, color=colour, markersize=4, label=model)
    axis.set_yticks(numpy.arange(len(order))[::-1], [*order[:-1], "all at once"])
    axis.set(xlabel="finding out, divided by forecast (token-forward-passes)", xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(models), frameon=False)
    return _finished(figure)


def _amount(row: Row) -> list[float]:
    """What is drawn of a row: peak memory for the memory workload, tokens a second by repetition for others."""
    if row.workload == "memory":
        return [] if row.peak_memory_mb is None else [row.peak_memory_mb]
    return [row.tokens / seconds for seconds in row.seconds]


def speed(recorded: Benchmark) -> Figure:
    """A recorded benchmark: one panel a workload, one line a route; points are repetitions, the bar their median.

    Filled: this book's engine. The workload on rounding is left out, as its times are not what it measures.
    """
    _theme()
    groups = {name: rows for name, rows in recorded.workloads().items() if name != "precision"} or recorded.workloads()
    count = sum(map(len, groups.values()))
    figure, axes = plt.subplots(len(groups), 1, figsize=(7, 0.9 * len(groups) + 0.4 * count),
                                height_ratios=[len(rows) + 1 for rows in groups.values()], squeeze=False,
                                layout="constrained")
    for axis, (workload, rows) in zip(axes[:, 0], groups.items(), strict=True):
        memory = workload == "memory"
        for position, row in zip(range(len(rows))[::-1], rows, strict=True):
            values, ours = _amount(row), row.route.startswith("ours")
            if not values:
                axis.text(0, position, " not measured", va="center")
                continue
            middle = statistics.median(values)
            axis.barh(position, middle, height=0.6, color=BLUE if ours else "white", edgecolor=BLUE if ours else GREY,
                      hatch="" if ours else "///", zorder=2)
            axis.plot(values, [position] * len(values), ".", color="black", markersize=4, zorder=3)
            axis.text(max(values), position, f"  {middle:,.0f}", va="center")
        labels = [f"{row.label} ({row.tokens:,} tokens)" if memory else row.label for row in rows]
        axis.set_yticks(range(len(rows))[::-1], [_wrapped(label, 34) for label in labels])
        axis.set(title=WORKLOADS.get(workload, workload),
                 xlabel="peak memory beyond the weights (MB)" if memory else "tokens a second")
        axis.margins(x=0.2)
        axis.xaxis.set_major_locator(plt.MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda value, position: f"{value:,g}")
        axis.grid(axis="y", visible=False)
    return _finished(figure)
