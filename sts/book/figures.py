"""Five figures, drawn from rows: `intervals`, `scatter`, `curves`, `heat`, `bars`.

Legible on a phone: at most 7 inches wide, text of 10 points or more; colours that colour-blind readers can tell apart,
and no meaning carried by colour alone. Rows are a list of dicts or a DataFrame; fields may be dotted
("pearson_interval.low"). `panel` draws a panel for every value of that field, `hue` several points or bars a label;
`names` renames labels; a label of an axis may be a dict by panel; `marks` are dashed vertical lines, label -> place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy
import pandas
import seaborn
from adjustText import adjust_text
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sts.book.tables import rows_of, value_of

#: Okabe and Ito, without its yellow, which is too pale for points on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS, LINES, HATCHES = ("o", "s", "^", "D", "v", "P", "X", "*"), ("-", "--", "-.", ":"), ("", "///", "...", "xx")
GREY = "#666666"
#: The paper's domains in their order; others take what comes by their name.
DOMAINS = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history",
           "law", "math", "other", "philosophy", "physics", "psychology")
Names = Mapping[Any, str] | None
Axis = str | Mapping[Any, str]


def domain_style(domain: str) -> tuple[str, str]:
    """Colour and marker of a domain, the same in every figure."""
    place = DOMAINS.index(domain) if domain in DOMAINS else len(DOMAINS) + sum(domain.encode())
    return COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]


def _axes(panels: Mapping[Any, Any], height: float, *, across: int = 9, names: Names = None, **labels: Axis
          ) -> tuple[Figure, list[tuple[Axes, Any]]]:
    """A figure with a panel for each, titled; (axis, what the panel shows), row by row."""
    size = 10
    seaborn.set_theme(style="whitegrid", rc={"figure.dpi": 110, "savefig.bbox": "tight", "font.size": size} | {
        f"{what}size": size for what in ("axes.label", "axes.title", "xtick.label", "ytick.label", "legend.font")})
    panels = panels or {None: []}
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(7 if across > 1 else 6.5, height * down), sharey="row",
                                squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        shown = {what: label for what, label in labels.items() if what == "xlabel" or axis in axes[:, 0]}
        axis.set(title=_name(panel, names), **{what: label.get(panel, "") if isinstance(label, Mapping) else label
                                               for what, label in shown.items()})
    return figure, list(zip(axes.flat, panels.values(), strict=False))


def _closed(figure: Figure) -> Figure:
    handles = {label: handle for axis in figure.axes
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)  # the notebook shows what a function returns; left open, it would be shown twice
    return figure


def _grouped(rows: Sequence[dict], name: str | None) -> dict[Any, list[dict]]:
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(value_of(row, name), []).append(row)
    return groups


def _name(value: Any, names: Names) -> str:
    return (names or {}).get(value, "" if value is None else str(value))


def _marks(axis: Axes, marks: Mapping[str, float]) -> None:
    for place, (label, value) in enumerate(marks.items()):
        axis.axvline(value, color=GREY, linestyle=LINES[3 - place % 3], label=label)


def _listed(rows: Any, y: str, x: str, panel: str | None, hue: str | None, xlabel: Axis, names: Names, room: float,
            draw: Callable[[Axes, dict, float, int, float], None], marks: Mapping[str, float] = {},
            zero: float | None = None) -> Figure:
    """Labels from the top; `draw(axis, row, height, place of the hue, width)` draws each row."""
    rows = [row for row in rows_of(rows) if value_of(row, x) is not None]
    labels, hues = list(_grouped(rows, y)), list(_grouped(rows, hue))
    width = 0.8 / max(1, len(hues))
    height = 1.1 + len(labels) * (0.2 + room * len(hues))
    figure, axes = _axes(_grouped(rows, panel), height, names=names, xlabel=xlabel)
    for axis, own in axes:
        for row in own:
            place = hues.index(value_of(row, hue))
            draw(axis, row, labels.index(value_of(row, y)) + width * (place - (len(hues) - 1) / 2), place, width)
        if zero is not None:
            axis.axvline(zero, color="black", linewidth=0.8)
            axis.locator_params(axis="x", nbins=5)
        _marks(axis, marks)
        axis.set_yticks(range(len(labels)), [_name(label, names) for label in labels])
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.margins(x=0.1)
    return _closed(figure)


def intervals(rows: Any, y: str = "label", x: str = "value", low: str = "low", high: str = "high", *,
              panel: str | None = None, hue: str | None = None, xlabel: Axis = "", zero: float = 0.0,
              marks: Mapping[str, float] = {}, names: Names = None) -> Figure:
    """A point with its interval for every label; hollow where the interval includes `zero` or is missing."""
    def draw(axis: Axes, row: dict, at: float, place: int, width: float) -> None:
        ends, colour = (value_of(row, low), value_of(row, high)), COLOURS[place]
        clear = None not in ends and not ends[0] <= zero <= ends[1]
        if None not in ends:
            axis.plot(ends, [at, at], color=colour, linewidth=1.4)
        axis.plot(value_of(row, x), at, MARKERS[place], color=colour, markerfacecolor=colour if clear else "white")
        if hue:
            axis.plot([], [], MARKERS[place], color=colour, label=_name(value_of(row, hue), names))

    return _listed(rows, y, x, panel, hue, xlabel, names, 0.1, draw, marks, zero)


def bars(rows: Any, y: str = "label", x: str = "value", *, panel: str | None = None, hue: str | None = None,
         xlabel: Axis = "", names: Names = None, form: str | None = None, logx: bool = False) -> Figure:
    """A horizontal bar for every label, for numbers without an interval; `form` writes the number at its end."""
    def draw(axis: Axes, row: dict, at: float, place: int, width: float) -> None:
        drawn = axis.barh(at, value_of(row, x), 0.9 * width, color=COLOURS[place], hatch=HATCHES[place % 4],
                          edgecolor="white", label=_name(value_of(row, hue), names) or None)
        if form:
            axis.bar_label(drawn, [format(value_of(row, x), form)], padding=3)
        axis.set_xscale("log" if logx else "linear")

    return _listed(rows, y, x, panel, hue, xlabel, names, 0.18, draw)


def scatter(rows: Any, x: str = "score", y: str = "change", label: str = "domain", *, low: str | None = None,
            high: str | None = None, panel: str | None = None, filled: str | None = None, fit: bool = True,
            xlabel: Axis = "", ylabel: str = "", names: Names = None) -> Figure:
    """A named point for every row, one colour and marker a label, with a vertical bar and the least-squares line.

    A point is hollow where zero lies between the ends of its bar, or where the field `filled` is false.
    """
    rows = [row for row in rows_of(rows) if None not in (value_of(row, x), value_of(row, y))]
    figure, axes = _axes(_grouped(rows, panel), 3.6, across=2, names=names, xlabel=xlabel, ylabel=ylabel)
    for axis, own in axes:
        places = numpy.array([[value_of(row, x), value_of(row, y)] for row in own], dtype=float).reshape(-1, 2)
        for row, (right, up) in zip(own, places, strict=True):
            colour, marker = domain_style(str(value_of(row, label)))
            ends = value_of(row, low), value_of(row, high)
            clear = (filled is None or bool(value_of(row, filled))) and (None in ends or not ends[0] <= 0 <= ends[1])
            if None not in ends:
                axis.plot([right, right], ends, color=GREY, linewidth=0.9, alpha=0.6)
            axis.plot(right, up, marker, color=colour, markerfacecolor=colour if clear else "white")
        if fit and len(places) > 2 and numpy.ptp(places[:, 0]) > 0:
            slope, intercept = numpy.polyfit(places[:, 0], places[:, 1], 1)
            span = numpy.array([places[:, 0].min(), places[:, 0].max()])
            axis.plot(span, intercept + slope * span, color=GREY, linestyle="--")
        axis.margins(x=0.14, y=0.1)
        axis.locator_params(axis="x", nbins=4)
        _write_names(axis, places, [_name(value_of(row, label), names) for row in own])
    return _closed(figure)


def _write_names(axis: Axes, places: numpy.ndarray, labels: Sequence[str]) -> None:
    """Each point's name beside it, moved off other names and points, with a line to the point."""
    if not labels or len(labels) > 30:  # more names than that hide the points
        return
    texts = [axis.text(right, up, text, path_effects=[patheffects.withStroke(linewidth=2, foreground="white")])
             for (right, up), text in zip(places, labels, strict=True)]
    before = numpy.random.get_state()
    numpy.random.seed(0)  # adjustText draws from numpy's own generator; a page must come out alike each time
    try:
        adjust_text(texts, x=places[:, 0], y=places[:, 1], ax=axis, expand=(1.15, 1.7), iter_lim=300,
                    arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6})
    finally:
        numpy.random.set_state(before)


def curves(lines: Mapping[str, Any], xlabel: Axis = "", ylabel: str = "", *, logx: bool = False, logy: bool = False,
           marks: Mapping[str, float] = {}, markers: bool = False, panels: bool = False,
           ylim: tuple[float | None, float | None] | None = None) -> Figure:
    """Lines by label, each (x, y) or (x, y, low, high) with a shaded band; with `panels`, lines by label by panel."""
    by_panel = lines if panels else {None: lines}
    order = list(dict.fromkeys(label for own in by_panel.values() for label in own))
    figure, axes = _axes(by_panel, 3.6, xlabel=xlabel, ylabel=ylabel)
    for axis, own in axes:
        for label, values in own.items():
            place = order.index(label)
            x, y, *band = (numpy.asarray(one, dtype=float) for one in values)
            axis.plot(x, y, color=COLOURS[place % 7], linestyle=LINES[place % 4], label=label,
                      marker=MARKERS[place % 8] if markers else None)
            if band:
                axis.fill_between(x, band[0], band[1], color=COLOURS[place % 7], alpha=0.2, linewidth=0)
        _marks(axis, marks)
        axis.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear", ylim=ylim)
    return _closed(figure)


def heat(frame: pandas.DataFrame, xlabel: str = "", ylabel: str = "", label: str = "", form: str = ".2f",
         centre: float | None = None) -> Figure:
    """A table of numbers, coloured; diverging about `centre`, if there is one."""
    figure, [(axis, _)] = _axes({}, 1.4 + 0.36 * len(frame))
    seaborn.heatmap(frame.astype(float), ax=axis, annot=True, fmt=form, center=centre, linewidths=0.5,
                    cmap="viridis" if centre is None else "vlag", cbar_kws={"label": label}, annot_kws={"size": 10})
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.tick_params(axis="y", rotation=0)
    return _closed(figure)
