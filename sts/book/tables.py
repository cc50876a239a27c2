"""Rows as HTML tables, whose columns are listed where the table stands, in the notebook. All text is escaped."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import pandas

Column = str | Callable[[dict], Any]


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


def rows_of(rows: Any) -> list[dict]:
    """A frame, a list of dicts or dataclasses, or a single dict, as dicts."""
    if isinstance(rows, pandas.DataFrame):
        return rows.to_dict("records")
    return [dict(row) if isinstance(row, Mapping) else vars(row)
            for row in ([rows] if isinstance(rows, Mapping) else rows)]


def value_of(row: Any, path: str | None) -> Any:
    """The value of a field, None where it is not known; dots reach into dicts ("pearson_interval.low")."""
    for part in [path] if not path or path in row else path.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row if row == row else None  # NaN


def _cell(row: dict, column: Column) -> str:
    """What a column shows of a row: a field, a format (anything with a brace) or what a function returns."""
    if isinstance(column, str) and "{" in column:
        return shown(column, **row)
    value = column(row) if callable(column) else value_of(row, column)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float | None):
        return str(value)
    return shown("{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else "{value:,.0f}", value=value)


def table(rows: Any, columns: Mapping[str, Column] | None = None, fold: str | None = None) -> str:
    """An HTML table that scrolls inside its own box; see `rows_of`. Columns by heading: a field, a format (anything
    with a brace) or a function of the row."""
    listed = rows_of(rows)
    columns = columns or {name: name for name in (listed[0] if listed else ())}
    body = "".join(f"<tr>{cells(_cell(row, column) for column in columns.values())}</tr>" for row in listed)
    found = (f'<div class="sts-scroll"><table class="dataframe"><thead><tr>{cells(columns, "th")}</tr></thead>'
             f"<tbody>{body}</tbody></table></div>")
    return folded(fold, found) if fold else found


def cells(texts: Any, tag: str = "td") -> str:
    """Cells of a row of a table, escaped."""
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def folded(title: str, content: str, kind: str = "") -> str:
    """HTML that opens on a click."""
    return f'<details class="{kind}"><summary>{escape(title)}</summary>{content}</details>'
