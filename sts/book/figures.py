"""Five figures, drawn from rows: `intervals`, `scatter`, `curves`, `heat`, `bars`.

Legible on a phone: at most 7 inches wide, text of 10 points or more; colours that colour-blind readers can tell apart, and
no meaning carried by colour alone. Rows are a list of dicts or a DataFrame; fields may be dotted ("pearson_interval.low").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy
import pandas
import seaborn
from adjustText import adjust_text
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sts.book.tables import Absent, field, rows_of

#: Okabe and Ito, without its yellow, which is too pale for points on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
GREY = "#666666"
#: The paper's domains in their order; others take what comes next, by name.
DOMAINS = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
           "math", "other", "philosophy", "physics", "psychology")


def domain_style(domain: str) -> tuple[str, str]:
    """Colour and marker of a domain, the same in every figure."""
    place = DOMAINS.index(domain) if domain in DOMAINS else len(DOMAINS) + sum(domain.encode())
    return COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]


def _axes(columns: int, height: float, *, rows: int = 1, sharey: bool | str = True) -> tuple[Figure, numpy.ndarray]:
    seaborn.set_theme(style="whitegrid", rc={
        "font.size": 10, "axes.labelsize": 10, "axes.titlesize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10,
        "legend.fontsize": 10, "figure.dpi": 110, "savefig.bbox": "tight"})
    return plt.subplots(rows, columns, figsize=(7 if columns > 1 else 6.5, height), sharey=sharey, squeeze=False,
                        layout="constrained")


def _closed(figure: Figure) -> Figure:
    handles = {label: handle for axis in figure.axes
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)  # the notebook shows what a function returns; left open, it would be shown twice
    return figure


def _value(row: Mapping[str, Any], path: str | None) -> Any:
    try:
        return field(row, path) if path else None
    except Absent:
        return None


def _grouped(rows: Sequence[dict], name: str | None) -> dict[Any, list[dict]]:
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(_value(row, name), []).append(row)
    return groups


def _name(value: Any, names: Mapping[Any, str] | None) -> str:
    return (names or {}).get(value, "" if value is None else str(value))


def _marks(axis: Axes, marks: Mapping[str, float], *, vertical: bool = True) -> None:
    for place, (label, value) in enumerate(dict(marks).items()):
        (axis.axvline if vertical else axis.axhline)(value, color=COLOURS[1], linestyle=LINES[1 + place % 3], label=label)


def intervals(rows: Any, y: str = "label", x: str = "value", low: str = "low", high: str = "high", *,
              panel: str | None = None, hue: str | None = None, xlabel: str | Mapping[Any, str] = "", zero: float = 0.0,
              marks: Mapping[str, float] = {}, names: Mapping[Any, str] | None = None) -> Figure:
    """A point with its interval for every label, from the top; hollow where the interval includes `zero` or is missing.

    Args:
        panel, hue: a panel for every value of that field; several points a label.
        xlabel: of all panels, or by panel.
        marks: label -> where a dashed vertical line stands.
    """
    rows = [row for row in rows_of(rows) if _value(row, x) is not None]
    labels, hues = list(_grouped(rows, y)), list(_grouped(rows, hue))
    panels = _grouped(rows, panel) or {None: []}
    figure, axes = _axes(len(panels), 1.1 + len(labels) * (0.26 + 0.1 * (len(hues) - 1)))
    for axis, (title, own) in zip(axes[0], panels.items(), strict=True):
        for row in own:
            place = hues.index(_value(row, hue))
            at = labels.index(_value(row, y)) + 0.22 * (place - (len(hues) - 1) / 2)
            ends = _value(row, low), _value(row, high)
            if None not in ends:
                axis.plot(ends, [at, at], color=COLOURS[place], linewidth=1.4)
            clear = None not in ends and (ends[0] > zero or ends[1] < zero)
            axis.plot(_value(row, x), at, MARKERS[place], color=COLOURS[place],
                      markerfacecolor=COLOURS[place] if clear else "white")
        axis.axvline(zero, color="black", linewidth=0.8)
        _marks(axis, marks)
        axis.set(xlabel=xlabel.get(title, "") if isinstance(xlabel, Mapping) else xlabel, title=_name(title, names))
        axis.set_yticks(range(len(labels)), [_name(label, names) for label in labels])
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.locator_params(axis="x", nbins=5)
    for place, value in enumerate(hues if hue else ()):
        axes[0, 0].plot([], [], MARKERS[place] + "-", color=COLOURS[place], label=_name(value, names))
    return _closed(figure)


def scatter(rows: Any, x: str = "score", y: str = "change", label: str = "domain", *, low: str | None = None,
            high: str | None = None, panel: str | None = None, filled: str | None = None, fit: bool = True,
            xlabel: str | Mapping[Any, str] = "", ylabel: str = "", names: Mapping[Any, str] | None = None) -> Figure:
    """A point for every row, named; one colour and marker a label.

    Args:
        low, high: ends of the vertical bar; hollow where zero lies between them (bars of an absolute change start at 0).
        filled: field that is false where a point is hollow.
        fit: draw the least-squares line.
    """
    rows = [row for row in rows_of(rows) if None not in (_value(row, x), _value(row, y))]
    panels = _grouped(rows, panel) or {None: []}
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = _axes(across, 0.4 + 3.4 * down, rows=down, sharey="row")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, (title, own) in zip(axes.flat, panels.items(), strict=False):
        places = numpy.array([[_value(row, x), _value(row, y)] for row in own], dtype=float).reshape(-1, 2)
        for row, (right, up) in zip(own, places, strict=True):
            colour, marker = domain_style(str(_value(row, label)))
            ends = _value(row, low), _value(row, high)
            clear = filled is None or bool(_value(row, filled))
            if None not in ends:
                clear = clear and not ends[0] <= 0 <= ends[1]
                axis.plot([right, right], ends, color=GREY, linewidth=0.9, alpha=0.6)
            axis.plot(right, up, marker, color=colour, markerfacecolor=colour if clear else "white")
        if fit and len(places) > 2 and numpy.ptp(places[:, 0]) > 0:
            slope, intercept = numpy.polyfit(*places.T, 1)
            ends = numpy.array([places[:, 0].min(), places[:, 0].max()])
            axis.plot(ends, intercept + slope * ends, color=GREY, linestyle="--")
        axis.margins(x=0.14, y=0.1)
        _write_names(axis, places, [_name(_value(row, label), names) for row in own])
        axis.set(xlabel=xlabel.get(title, "") if isinstance(xlabel, Mapping) else xlabel, title=_name(title, names))
        axis.locator_params(axis="x", nbins=4)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    return _closed(figure)


def _write_names(axis: Axes, places: numpy.ndarray, labels: Sequence[str]) -> None:
    """Each point's name beside it, moved off other names and points, with a line to the point."""
    if not labels or len(labels) > 30:  # more names than that hide the points
        return
    texts = [axis.text(*place, text, fontsize=10, path_effects=[patheffects.withStroke(linewidth=2, foreground="white")])
             for place, text in zip(places, labels, strict=True)]
    before = numpy.random.get_state()
    numpy.random.seed(0)  # adjustText draws from numpy's own generator; a page must come out alike each time
    try:
        adjust_text(texts, x=places[:, 0], y=places[:, 1], ax=axis, expand=(1.15, 1.7), iter_lim=300,
                    arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6})
    finally:
        numpy.random.set_state(before)


def curves(lines: Mapping[str, Any], xlabel: str = "", ylabel: str = "", *, logx: bool = False, logy: bool = False,
           marks: Mapping[str, float] = {}, markers: bool = False, panels: bool = False,
           ylim: tuple[float | None, float | None] | None = None) -> Figure:
    """Lines by label, each (x, y) or (x, y, low, high) with a shaded band.

    Args:
        marks: label -> where a dashed vertical line stands.
        panels: `lines` is panel -> lines; a line's style is that of its label in all panels.
    """
    by_panel = lines if panels else {None: lines}
    order = list(dict.fromkeys(label for own in by_panel.values() for label in own))
    figure, axes = _axes(len(by_panel), 3.6)
    for axis, (title, own) in zip(axes[0], by_panel.items(), strict=True):
        for label, values in own.items():
            place = order.index(label)
            x, y, *band = (numpy.asarray(one, dtype=float) for one in values)
            colour = COLOURS[place % len(COLOURS)]
            if band:
                axis.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
            axis.plot(x, y, color=colour, linestyle=LINES[place % len(LINES)], label=label,
                      marker=MARKERS[place % len(MARKERS)] if markers else None)
        _marks(axis, marks)
        axis.set(xlabel=xlabel, title=title or "", xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        if ylim:
            axis.set_ylim(*ylim)
        if not logx:
            axis.locator_params(axis="x", nbins=5)
    axes[0, 0].set_ylabel(ylabel)
    return _closed(figure)


def heat(frame: pandas.DataFrame, xlabel: str = "", ylabel: str = "", label: str = "", form: str = ".2f",
         centre: float | None = None) -> Figure:
    """A table of numbers, coloured; diverging about `centre`, if there is one."""
    figure, axes = _axes(1, 1.4 + 0.36 * len(frame))
    seaborn.heatmap(frame.astype(float), ax=axes[0, 0], annot=True, fmt=form, center=centre, linewidths=0.5,
                    cmap="viridis" if centre is None else "vlag", cbar_kws={"label": label}, annot_kws={"size": 10})
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    axes[0, 0].tick_params(axis="y", rotation=0)
    return _closed(figure)


def bars(rows: Any, y: str = "label", x: str = "value", *, hue: str | None = None, panel: str | None = None,
         xlabel: str | Mapping[Any, str] = "", names: Mapping[Any, str] | None = None, form: str | None = None,
         logx: bool = False) -> Figure:
    """A horizontal bar for every label, from the top; `hue` puts several side by side, `form` writes the number."""
    rows = [row for row in rows_of(rows) if _value(row, x) is not None]
    labels, hues = list(_grouped(rows, y)), list(_grouped(rows, hue))
    panels = _grouped(rows, panel) or {None: []}
    figure, axes = _axes(len(panels), 1.1 + len(labels) * (0.2 + 0.18 * len(hues)))
    height = 0.8 / max(1, len(hues))
    for axis, (title, own) in zip(axes[0], panels.items(), strict=True):
        for row in own:
            place = hues.index(_value(row, hue))
            at = labels.index(_value(row, y)) + height * (place - (len(hues) - 1) / 2)
            drawn = axis.barh(at, _value(row, x), height * 0.9, color=COLOURS[place], hatch=("", "///", "...", "xx")[place % 4],
                              edgecolor="white")
            if form:
                axis.bar_label(drawn, labels=[format(_value(row, x), form)], padding=3)
        axis.set(xlabel=xlabel.get(title, "") if isinstance(xlabel, Mapping) else xlabel, title=_name(title, names),
                 xscale="log" if logx else "linear")
        axis.set_yticks(range(len(labels)), [_name(label, names) for label in labels])
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.margins(x=0.12)
        for place, value in enumerate(hues if hue else ()):
            axis.barh([0], [0], color=COLOURS[place], hatch=("", "///", "...", "xx")[place % 4], edgecolor="white",
                      label=_name(value, names))
    return _closed(figure)
