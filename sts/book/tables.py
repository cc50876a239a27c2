"""Rows as HTML tables, whose columns are listed where the table stands, in the notebook. All text is escaped."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import pandas

Column = str | Callable[[dict], Any]


class _Formats(string.Formatter):
    """`str.format` that stops at what is absent, None or NaN, and never says "-0.00"."""

    def get_field(self, name, args, kwargs):
        value, first = super().get_field(name, args, kwargs)
        if _unknown(value):
            raise KeyError(name)
        return value, first

    def format_field(self, value, spec):
        text = super().format_field(value, spec)
        return text if set("123456789") & set(text) or not isinstance(value, float) else text.lstrip("+-")


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def shown(text: str, **values: Any) -> str:
    """`text.format(**values)`; "" where one of the values is not known."""
    try:
        return _Formats().vformat(text, (), values)
    except (KeyError, TypeError):
        return ""


def rows_of(rows: Any) -> list[dict]:
    """A frame, a list of dicts or dataclasses, or a single one of these, as dicts."""
    if isinstance(rows, pandas.DataFrame):
        return rows.to_dict("records")
    listed: Any = [rows] if isinstance(rows, Mapping) or hasattr(rows, "__dataclass_fields__") else rows
    return [dict(row) if isinstance(row, Mapping) else dataclasses.asdict(row) for row in listed]


def value_of(row: Any, path: str | None) -> Any:
    """The value of a field, None where it is not known; dots reach into dicts ("pearson_interval.low")."""
    for part in [] if not path else [path] if path in row else path.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return None if not path or _unknown(row) else row


def cell(row: dict, column: Column) -> str:
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
    """An HTML table that scrolls inside its own box; see `rows_of` and, for columns by heading, `cell`."""
    listed = rows_of(rows)
    columns = columns or {name: name for name in (listed[0] if listed else ())}
    body = "".join(f"<tr>{cells(cell(row, column) for column in columns.values())}</tr>" for row in listed)
    found = (f'<div class="sts-scroll"><table class="dataframe"><thead><tr>{cells(columns, "th")}</tr></thead>'
             f"<tbody>{body}</tbody></table></div>")
    return folded(fold, found) if fold else found


def cells(texts: Any, tag: str = "td") -> str:
    """Cells of a row of a table, escaped."""
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def folded(title: str, content: str, kind: str = "") -> str:
    """HTML that opens on a click."""
    return f'<details class="{kind}"><summary>{escape(title)}</summary>{content}</details>'
