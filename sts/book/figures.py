"""Rows as five figures, `intervals`, `scatter`, `curves`, `heat` and `bars`, and as a `table` in HTML, escaped.

Rows are a list of dicts or dataclasses, a DataFrame or a single dict; fields may be dotted ("pearson_interval.low").
Figures are legible on a phone: at most 7 inches wide, text of 10 points or more; colours that colour-blind readers can
tell apart, and no meaning carried by colour alone. `panel` draws a panel for every value of that field, `hue` several
points or bars a label; `names` renames labels.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy
import pandas
import seaborn
from adjustText import adjust_text
from IPython.display import HTML
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Okabe and Ito, without its yellow, which is too pale for points on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS, LINES, HATCHES = ("o", "s", "^", "D", "v", "P", "X", "*"), ("-", "--", "-.", ":"), ("", "///", "...", "xx")
GREY = "#666666"
THEME = {"figure.dpi": 110, "savefig.bbox": "tight"} | dict.fromkeys(
    ("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10)
#: With more domains lines lie closer, and a scatter names those at its rim alone.
MANY, NAMED = 20, 8
Column = str | Callable[[dict], Any]


def rows_of(rows: Any) -> list[dict]:
    """Rows as dicts."""
    if isinstance(rows, pandas.DataFrame):
        return rows.to_dict("records")
    return [dict(row) if isinstance(row, Mapping) else vars(row)
            for row in ([rows] if isinstance(rows, Mapping) else rows)]


def value_of(row: Any, path: str | None) -> Any:
    """The value of a field, None where it is not known; dots reach into dicts."""
    for part in [path] if not path or path in row else path.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row if row == row else None  # NaN


def _axes(panels: Sequence, height: float, names: Mapping = {}, **labels: str) -> tuple[Figure, dict[Any, Axes]]:
    """A figure with a titled axis for each panel, side by side."""
    seaborn.set_theme(style="whitegrid", rc=THEME)
    figure, grid = plt.subplots(1, len(panels), figsize=(7 if len(panels) > 1 else 6.5, height), sharey=True,
                                squeeze=False, layout="constrained")
    for panel, axis in zip(panels, grid.flat, strict=True):
        axis.set(title=names.get(panel, panel), **labels)
        axis.label_outer()
    return figure, dict(zip(panels, grid.flat, strict=True))


def _closed(figure: Figure) -> Figure:
    handles = {label: handle for axis in figure.axes
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)  # the notebook shows what a function returns; left open, it would be shown twice
    return figure


def _kinds(rows: Sequence[dict], field: str | None) -> list:
    return list(dict.fromkeys(value_of(row, field) for row in rows)) or [None]


def _listed(rows: Any, y: str, x: str, panel: str | None, hue: str | None, xlabel: str, names: Mapping,
            room: float) -> tuple[Figure, list[tuple[Axes, dict, float, int, float]]]:
    """A figure with labels from the top, and for each row: axis, row, height, place of the hue, width."""
    rows = [row for row in rows_of(rows) if value_of(row, x) is not None]
    labels, hues = _kinds(rows, y), _kinds(rows, hue)
    each = 0.2 + room * len(hues) if len(labels) <= MANY else 0.16
    figure, axes = _axes(_kinds(rows, panel), 1.1 + len(labels) * each, names, xlabel=xlabel)
    for axis in axes.values():
        axis.set_yticks(range(len(labels)), [names.get(label, label) for label in labels])
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.margins(x=0.1)
    drawn, width = [], 0.8 / len(hues)
    for row in rows:
        place = hues.index(value_of(row, hue))
        at = labels.index(value_of(row, y)) + width * (place - (len(hues) - 1) / 2)
        drawn.append((axes[value_of(row, panel)], row, at, place % len(COLOURS), width))
    return figure, drawn


def intervals(rows: Any, y: str = "label", x: str = "value", low: str = "low", high: str = "high", *,
              panel: str | None = None, hue: str | None = None, xlabel: str = "", zero: float = 0.0,
              names: Mapping[Any, str] = {}) -> Figure:
    """A point with its interval for every label; hollow where the interval includes `zero` or is missing."""
    figure, drawn = _listed(rows, y, x, panel, hue, xlabel, names, 0.1)
    for axis, row, at, place, _ in drawn:
        ends, colour = (value_of(row, low), value_of(row, high)), COLOURS[place]
        clear = None not in ends and not ends[0] <= zero <= ends[1]
        if None not in ends:
            axis.plot(ends, [at, at], color=colour, linewidth=1.4)
        axis.plot(value_of(row, x), at, MARKERS[place], color=colour, markerfacecolor=colour if clear else "white")
        if hue:
            axis.plot([], [], MARKERS[place], color=colour, label=names.get(value_of(row, hue), value_of(row, hue)))
    for axis in figure.axes:
        axis.axvline(zero, color="black", linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
    return _closed(figure)


def bars(rows: Any, y: str = "label", x: str = "value", *, panel: str | None = None, hue: str | None = None,
         xlabel: str = "", names: Mapping[Any, str] = {}, form: str | None = None, logx: bool = False) -> Figure:
    """A horizontal bar for every label, for numbers without an interval; `form` writes the number at its end."""
    figure, drawn = _listed(rows, y, x, panel, hue, xlabel, names, 0.18)
    for axis, row, at, place, width in drawn:
        bar = axis.barh(at, value_of(row, x), 0.9 * width, color=COLOURS[place], hatch=HATCHES[place % 4],
                        edgecolor="white", label=names.get(value_of(row, hue), value_of(row, hue)))
        if form:
            axis.bar_label(bar, fmt=f"{{:{form}}}", padding=3)
        axis.set_xscale("log" if logx else "linear")
    return _closed(figure)


def scatter(rows: Any, x: str = "score", y: str = "change", *, panel: str | None = None, filled: str | None = None,
            fit: bool = True, xlabel: str = "", ylabel: str = "", names: Mapping[Any, str] = {}) -> Figure:
    """A named point for every row's `domain`, hollow where the field `filled` is false, with the least-squares line."""
    rows = [row for row in rows_of(rows) if None not in (value_of(row, x), value_of(row, y))]
    figure, axes = _axes(_kinds(rows, panel), 3.6, names, xlabel=xlabel, ylabel=ylabel)
    texts, halo = {axis: [] for axis in axes.values()}, [patheffects.withStroke(linewidth=2, foreground="white")]
    for row in rows:
        axis, face = axes[value_of(row, panel)], COLOURS[0] if filled is None or row[filled] else "white"
        axis.plot(row[x], row[y], MARKERS[0], color=COLOURS[0], markerfacecolor=face)
        texts[axis].append(axis.text(row[x], row[y], row["domain"].replace("_", " "), path_effects=halo))
    for axis, own in texts.items():
        right, up = numpy.array([text.get_position() for text in own], dtype=float).reshape(-1, 2).T
        if fit and len(own) > 2:
            seaborn.regplot(x=right, y=up, ax=axis, ci=None, scatter=False, color=GREY,
                            line_kws={"linestyle": "--", "linewidth": 1.5})
        axis.margins(x=0.14, y=0.1)
        axis.locator_params(axis="x", nbins=4)
        if len(own) > MANY:
            far = sum(((values - values.mean()) / (values.std() or 1)) ** 2 for values in (right, up))
            for place in numpy.argsort(far)[:-NAMED]:
                own[place].remove()
            own = [own[place] for place in numpy.argsort(far)[-NAMED:]]
            plt.setp(own, size="small")
        if own:
            adjust_text(own, x=right, y=up, ax=axis, expand=(1.15, 1.7), iter_lim=300,
                        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6})
    return _closed(figure)


def curves(lines: Mapping[str, Any], xlabel: str = "", ylabel: str = "", *, logx: bool = False,
           marks: Mapping[str, float] = {}, markers: bool = False,
           ylim: tuple[float | None, float | None] | None = None) -> Figure:
    """Lines by label, each (x, y) or (x, y, low, high) with a shaded band; `marks` are vertical lines, label -> x."""
    figure, axes = _axes([None], 3.6, xlabel=xlabel, ylabel=ylabel)
    axis = axes[None]
    for place, (label, values) in enumerate(lines.items()):
        x, y, *band = (numpy.asarray(one, dtype=float) for one in values)
        axis.plot(x, y, color=COLOURS[place % 7], linestyle=LINES[place % 4], label=label,
                  marker=MARKERS[place % 8] if markers else None)
        if band:
            axis.fill_between(x, band[0], band[1], color=COLOURS[place % 7], alpha=0.2, linewidth=0)
    for label, value in marks.items():
        axis.axvline(value, color=GREY, linestyle=":", label=label)
    axis.set(xscale="log" if logx else "linear", ylim=ylim)
    return _closed(figure)


def heat(frame: pandas.DataFrame, xlabel: str = "", ylabel: str = "", label: str = "", form: str = ".2f",
         centre: float | None = None) -> Figure:
    """A table of numbers, coloured; diverging about `centre`, if there is one."""
    few = len(frame) <= MANY
    figure, axes = _axes([None], 1.4 + (0.36 if few else 0.16) * len(frame))
    seaborn.heatmap(frame.astype(float), ax=axes[None], annot=few, yticklabels=True, fmt=form, center=centre,
                    linewidths=0.5, cmap="viridis" if centre is None else "vlag", cbar_kws={"label": label},
                    annot_kws={"size": 10})
    axes[None].set(xlabel=xlabel, ylabel=ylabel)
    axes[None].tick_params(axis="y", rotation=0)
    return _closed(figure)


class _Formats(string.Formatter):
    """`str.format` that stops at what is absent, None or NaN, and never says "-0.00"."""

    def format_field(self, value, spec):
        if value is None or value != value:
            raise TypeError
        text = super().format_field(value, spec)
        return text if set("123456789") & set(text) or not isinstance(value, float) else text.lstrip("+-")


def shown(text: str, **values: Any) -> str:
    """`text.format(**values)`; "" where one of the values is not known."""
    try:
        return _Formats().vformat(text, (), values)
    except (KeyError, TypeError):
        return ""


def _cell(row: dict, column: Column) -> str:
    if isinstance(column, str) and "{" in column:
        return escape(shown(column, **row))
    value = column(row) if callable(column) else value_of(row, column)
    if isinstance(value, HTML):
        return str(value.data)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float | None):
        return escape(str(value))
    return shown("{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else "{value:,.0f}", value=value)


def table(rows: Any, columns: Mapping[str, Column] | None = None, fold: str | None = None) -> HTML:
    """A table that scrolls inside its own box, folded under a title if there is one. Columns by heading: a field, a
    format (anything with a brace) or a function of the row; HTML stays HTML."""
    listed = rows_of(rows)
    columns = columns or {name: name for name in (listed[0] if listed else ())}
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row, column)}</td>" for column in columns.values()) + "</tr>"
                   for row in listed)
    found = (f'<div class="sts-scroll"><table class="dataframe"><thead><tr>{head}</tr></thead>'
             f"<tbody>{body}</tbody></table></div>")
    return HTML(folded(fold, found) if fold else found)


def folded(title: str, content: str, kind: str = "") -> str:
    """HTML that opens on a click."""
    return f'<details class="{kind}"><summary>{escape(title)}</summary>{content}</details>'
